"""Reinforcement learning on tasks with a verdict: GRPO (DeepSeekMath, arXiv 2402.03300), by default in its plain form,
without KL, clipping and the division by the standard deviation (compare Dr. GRPO, arXiv 2503.20783).

A step samples every question several times, as one batch through the engine with its tools. A sample's advantage is its
reward less the mean of its question's; what a tool wrote carries no weight. rl.epochs and rl.minibatches say how many
updates a step makes of its samples, rl.kl, rl.clip and rl.zscore what these maximise (`policy.py`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np

from evals.tasks import load_task
from nanochat_jax import memory, sharding, train
from nanochat_jax.checkpoint import read_done
from nanochat_jax.errors import UserError
from nanochat_jax.model import cast_matrices, graph_of, merge
from nanochat_jax.stages import common, policy
from nanochat_jax.stages.rollouts import Questions, Sampler, minibatches, pass_at_k, training_batch


class Batch(NamedTuple):
    """What a step learns from: its minibatches' arrays, placed for the compiled train step."""

    step: int
    train: common.Step
    parts: list[dict]  # tokens, targets, weights, share; old and reference: -log p then, and of the reference or None


def default_task(run: common.Run) -> str:
    from evals.tasks import available

    return "gsm8k" if "gsm8k" in available(run.config.data, "train") else "arithmetic"


def load_questions(run: common.Run, shares: dict[str, int], split: str) -> Questions:
    """The questions of a split. UserError for a task whose answers are not generated."""
    tasks = {n: load_task(n, split=split, data=run.config.data, cache_dir=run.cache_dir) for n in shares}
    for name, task in tasks.items():
        if task.kind != "generative":
            raise UserError(f"rl.task={name} is {task.kind}; RL needs tasks whose answers are generated, such as gsm8k")
    return Questions(tasks, shares, run.config.seed)


def rows_per_device(run: common.Run) -> int:
    """Sequences of a minibatch that each data-parallel device takes. UserError where they cannot be shared evenly."""
    cfg, devices = run.config.rl, sharding.data_parallel(run.mesh)
    rows = cfg.questions * cfg.samples // cfg.minibatches
    if rows % devices:
        raise UserError(
            f"rl: {rows} sequences of an update, rl.questions x rl.samples / rl.minibatches, cannot be shared by "
            f"{devices} data-parallel devices; make them a multiple of {devices}"
        )
    return rows // devices


class Learner:
    """The updates that a step makes of its samples, and what it measures of them."""

    def __init__(self, run: common.Run, optimizer, reference: dict | None, held: int):
        """reference: parameters of the KL's other side; held: bytes on a device beside those of the train step."""
        self.run, self.cfg, self.reference = run, run.config.rl, reference
        low, high = self.cfg.clip, self.cfg.clip_high
        self._clip = None if low is None else (1 - low, 1 + (low if high is None else high))
        graph = graph_of(run.gpt_config, run.dtype)
        self._log_probs = policy.make_log_probs(graph, run.dtype, run.mesh)
        self._look = policy.make_look(self._log_probs)
        step, state = train.make_step(graph, optimizer, run.dtype, run.mesh), common.abstract_state(run, optimizer)
        arrays = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        rows = rows_per_device(run)

        @functools.cache
        def step_of(length: int) -> common.Step:
            return common.fit_step(run, "rl", step, state, arrays, (rows, length), self.cfg.micro_batch, held)

        self._step_of = step_of

    def prepare(self, step: int, params: dict, batch: dict) -> tuple[Batch, dict]:
        """The batch of a step from the arrays of `training_batch`, with -log p as of now; and mean entropy and KL."""
        compiled, parts, measured = self._step_of(batch["tokens"].shape[1]), [], []
        for part in minibatches(batch, self.cfg.minibatches):
            part = common.place(part, compiled.accumulation, self.run.mesh)
            old, reference, metrics = self._look(params, self.reference, part)
            parts.append({**part, "old": old, "reference": reference})
            measured.append(_read(metrics))
        return Batch(step, compiled, parts), _mean(measured)

    def __call__(self, state: train.TrainState, batch: Batch) -> tuple[train.TrainState, dict]:
        """All updates of a step; its metrics are their means."""
        measured = []
        for part in batch.parts * self.cfg.epochs:
            fixed = (part[k] for k in ("old", "reference", "weights", "share"))
            rows = {k: part[k] for k in ("tokens", "targets")}
            nll = self._log_probs(state.params, *rows.values())[0] if measured else part["old"]
            weights, clipped = policy.weigh(nll, *fixed, kl=self.cfg.kl or 0.0, clip=self._clip)
            rows["weights"] = jax.device_put(weights, part["weights"].sharding)
            state, metrics = batch.train.run(state, rows)
            measured.append({**metrics, **({} if self._clip is None else {"clip_fraction": clipped})})
        # a step of the loop is all of these updates, so that it is never left in their middle
        done = jax.device_put(np.int32(batch.step + 1), sharding.replicated(self.run.mesh))
        return state._replace(step=done), _mean(measured)


def _read(metrics: dict) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items()}


def _mean(measured: list[dict]) -> dict:
    return {k: sum(m[k] for m in measured) / len(measured) for k in measured[0]}


def main(run: common.Run) -> dict:
    cfg, tok, seed = run.config.rl, run.tokenizer, run.config.seed
    named = cfg.task or default_task(run)
    shares = named if isinstance(named, dict) else {named: 1}
    questions, held_out = (load_questions(run, shares, split) for split in ("train", "test"))
    before = next((s for s in ("sft", "mid", "base") if read_done(run.dir / s)), "sft")
    steps = cfg.steps or max(1, len(questions) // cfg.questions)
    rollouts_per_step = cfg.questions * cfg.samples
    updates = steps * cfg.epochs * cfg.minibatches
    optimizer = common.make_optimizer(
        run, cfg.optim, updates, run.config.base.batch_tokens or 2**19, cfg.optim.weight_decay or 0.0
    )
    reference = None
    if cfg.kl is not None:
        start = run.params_of(before)
        start = jax.device_put(start, sharding.tree_shardings(start, run.mesh))
        reference = cast_matrices(start, run.dtype)
    sampler = Sampler(run, merge(graph_of(run.gpt_config, run.dtype), run.params_of(before)), slots=rollouts_per_step)
    learner = Learner(run, optimizer, reference, held=memory.held_bytes((reference, sampler.engine.arrays)))
    words = " and ".join(shares)
    run.log.say(f"rl: {steps} steps of {cfg.questions} questions x {cfg.samples} samples of {words}, from {before}")

    def next_batch(step: int, params: dict) -> tuple[Batch, dict]:
        chosen = [questions[step * cfg.questions + i] for i in range(cfg.questions)]
        rollouts = sampler(params, chosen, cfg.samples, lambda q, s: common.mix_seed(seed, step, q, s))
        arrays = training_batch(rollouts, tok.assistant_end, tok.bos, run.config.model.sequence_len, cfg.zscore)
        batch, metrics = learner.prepare(step, params, arrays)
        return batch, {**rollouts.metrics(chosen), **metrics}

    def evaluate(step: int, params: dict) -> dict:
        """pass@k of the held-out questions, of each task where there are several."""
        chosen = [
            held_out.question(name, i)
            for name, task in held_out.tasks.items()
            for i in range(min(cfg.eval_questions, len(task)))
        ]
        rewards = sampler(params, chosen, cfg.eval_samples, lambda q, s: common.mix_seed(seed, q, s)).rewards
        out = pass_at_k(rewards)
        for name in shares if len(shares) > 1 else ():
            each = pass_at_k(rewards[[q.task is held_out.tasks[name] for q in chosen]])
            out |= {f"{name}/{k}": v for k, v in each.items()}
        return out

    return common.train_stage(
        run,
        "rl",
        init=lambda: run.params_of(before),
        optimizer=optimizer,
        step_fn=learner,
        steps=steps,
        next_batch=next_batch,
        tokens_per_step=rollouts_per_step * cfg.max_new_tokens,
        save_every=cfg.save_every,
        evaluate=evaluate,
        eval_every=cfg.eval_every,
        extra=lambda: {"task": named, "from": before},
    )

"""Reinforcement learning on a task with a verdict: GRPO in its plain form (DeepSeekMath, arXiv 2402.03300, without KL,
clipping and the division by the standard deviation; compare Dr. GRPO, arXiv 2503.20783).

A step samples every question several times, as one batch through the engine with its tools. A sample's advantage is its
reward less the mean of its question's. On policy and without a ratio, the gradient is that of a weighted negative
log-likelihood, so the step is that of the other stages; what a tool wrote carries no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evals.tasks import load_task
from evals.tasks.base import ScoredTask
from nanochat_jax import memory, train
from nanochat_jax.calculator import CalculatorTool
from nanochat_jax.checkpoint import read_done
from nanochat_jax.engine import Completion, Engine, Request
from nanochat_jax.errors import UserError
from nanochat_jax.model import graph_of, merge
from nanochat_jax.stages import common
from tokenizer.chat import parse_completion, render_prompt

_BUCKET = 64  # sequence lengths of the training batch are rounded up to multiples of this, to compile few shapes


@dataclass
class Rollouts:
    """Questions x samples: prompts (ids), completions and their rewards (Q, S)."""

    prompts: list[list[int]]
    completions: list[list[Completion]]
    rewards: np.ndarray


class Sampler:
    """Samples completions for questions of a task with the current parameters, and scores them."""

    def __init__(self, run: common.Run, task: ScoredTask, model, slots: int):
        self.run, self.task, self.cfg, self.tok = run, task, run.config.rl, run.tokenizer
        self.engine = Engine(
            model,
            slots=slots,
            max_len=run.config.model.sequence_len,
            tool=CalculatorTool(run.tokenizer),
            mesh=run.mesh,
        )

    def __call__(self, params: dict, questions, samples: int, seed_of) -> Rollouts:
        """seed_of(question, sample) -> int makes each sample a function of its place alone."""
        self.engine.update_params(params)
        conversations = [self.task[int(q)] for q in questions]
        prompts = [render_prompt(self.tok, c["messages"][:-1]) for c in conversations]
        requests = [
            Request(
                ids=p,
                max_new_tokens=self.cfg.max_new_tokens,
                temperature=self.cfg.temperature,
                top_k=self.cfg.top_k,
                seed=seed_of(int(q), s),
                stop_ids=(self.tok.assistant_end, self.tok.bos),
            )
            for q, p in zip(questions, prompts)
            for s in range(samples)
        ]
        flat = self.engine.generate(requests)
        completions = [flat[i * samples : (i + 1) * samples] for i in range(len(prompts))]
        rewards = [
            [self.task.reward(c, parse_completion(self.tok, x.ids)[0]) for x in group]
            for c, group in zip(conversations, completions)
        ]
        return Rollouts(prompts, completions, np.asarray(rewards, np.float32))


def training_batch(rollouts: Rollouts, end_id: int, pad_id: int, max_len: int) -> dict:
    """tokens, targets (N, T) int32 and weights (N, T) float32 such that sum(weights * nll) has the policy's gradient.

    weights = advantage / (sampled tokens of the question * questions): token-normalised within a question, as DAPO
    (arXiv 2503.14476) and the reference have it. The end token counts as sampled where the model chose to stop.
    """
    rows, masks = [], []
    for prompt, group in zip(rollouts.prompts, rollouts.completions):
        for c in group:
            end = [end_id] if c.finish_reason == "stop" else []
            rows.append((prompt + c.ids + end)[: max_len + 1])
            masks.append(([0] * len(prompt) + c.mask + [1] * len(end))[: max_len + 1])
    longest = max(len(r) for r in rows) - 1
    width = min(-(-longest // _BUCKET) * _BUCKET, max_len) + 1
    tokens = np.full((len(rows), width), pad_id, np.int32)
    sampled = np.zeros((len(rows), width), bool)
    for i, (row, mask) in enumerate(zip(rows, masks)):
        tokens[i, : len(row)], sampled[i, : len(mask)] = row, mask
    sampled = sampled[:, 1:]
    questions, samples = rollouts.rewards.shape
    advantage = rollouts.rewards - rollouts.rewards.mean(axis=1, keepdims=True)
    count = np.maximum(sampled.reshape(questions, samples, -1).sum(axis=(1, 2)), 1)
    weight = (advantage / (count[:, None] * questions)).reshape(-1, 1)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(sampled, tokens[:, 1:], -1),
        "weights": (weight * sampled).astype(np.float32),
    }


def pass_at_k(rewards: np.ndarray) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... of rewards (Q, S): unbiased, 1 - C(S - c, k) / C(S, k) (arXiv 2107.03374)."""
    samples = rewards.shape[1]
    correct = (rewards >= 1.0).sum(axis=1)
    out, k = {}, 1
    while k <= samples:
        miss = np.ones(len(correct))
        for i in range(k):  # C(S - c, k) / C(S, k) = prod_i (S - c - i) / (S - i)
            miss *= np.maximum(samples - correct - i, 0) / (samples - i)
        out[f"pass@{k}"] = float(1.0 - miss.mean())
        k *= 2
    return out


def default_task(run: common.Run) -> str:
    from evals.tasks import available

    return "gsm8k" if "gsm8k" in available(run.config.data, "train") else "arithmetic"


def main(run: common.Run) -> dict:
    cfg, tok = run.config.rl, run.tokenizer
    name = cfg.task or default_task(run)
    task = load_task(name, split="train", data=run.config.data, cache_dir=run.cache_dir)
    held_out = load_task(name, split="test", data=run.config.data, cache_dir=run.cache_dir)
    if task.kind != "generative":
        raise UserError(f"rl.task={name} is {task.kind}; RL needs a task whose answers are generated, such as gsm8k")
    before = next((s for s in ("sft", "mid", "base") if read_done(run.dir / s)), "sft")
    steps = cfg.steps or max(1, len(task) // cfg.questions)
    rollouts_per_step = cfg.questions * cfg.samples
    graph = graph_of(run.gpt_config, run.dtype)
    start = run.params_of(before)
    sampler = Sampler(run, task, merge(graph, start), slots=rollouts_per_step)
    judge = Sampler(run, held_out, merge(graph, start), slots=rollouts_per_step)
    length = run.config.model.sequence_len
    per_device = common.rows_per_device("rl", rollouts_per_step * length, length, run.mesh)
    accumulation = per_device // memory.micro_batches(per_device, cfg.micro_batch)[0]
    optimizer = common.make_optimizer(
        run, cfg.optim, steps, run.config.base.batch_tokens or 2**19, cfg.optim.weight_decay or 0.0
    )
    run.log.say(f"rl: {steps} steps of {cfg.questions} questions x {cfg.samples} samples of {name}, from {before}")

    def next_batch(step: int, params: dict) -> tuple[dict, dict]:
        per_epoch = max(1, len(task) // cfg.questions)
        order = common.permutation(run.config.seed, step // per_epoch, len(task))
        place = step % per_epoch * cfg.questions
        chosen = order[place : place + cfg.questions]
        rollouts = sampler(params, chosen, cfg.samples, lambda q, s: common.mix_seed(run.config.seed, step, q, s))
        batch = training_batch(rollouts, tok.assistant_end, tok.bos, run.config.model.sequence_len)
        lengths = [len(c.ids) for group in rollouts.completions for c in group]
        metrics = {"reward": float(rollouts.rewards.mean()), "completion_tokens": float(np.mean(lengths))}
        return common.place(batch, accumulation, run.mesh), metrics

    def evaluate(step: int, params: dict) -> dict:
        questions = range(min(cfg.eval_questions, len(held_out)))
        rollouts = judge(params, questions, cfg.eval_samples, lambda q, s: common.mix_seed(run.config.seed, q, s))
        return pass_at_k(rollouts.rewards)

    return common.train_stage(
        run,
        "rl",
        init=lambda: start,
        optimizer=optimizer,
        step_fn=train.make_step(graph, optimizer, run.dtype, run.mesh),
        steps=steps,
        next_batch=next_batch,
        tokens_per_step=rollouts_per_step * cfg.max_new_tokens,
        save_every=cfg.save_every,
        evaluate=evaluate,
        eval_every=cfg.eval_every,
        extra=lambda: {"task": name, "from": before},
    )

"""Reinforcement learning on tasks with a verdict: GRPO (DeepSeekMath, arXiv 2402.03300), by default in its plain form,
without KL, clipping and the division by the standard deviation (compare Dr. GRPO, arXiv 2503.20783); or DPO on pairs.

A step samples every question several times, as one batch through the engine with its tools. A sample's advantage is its
reward less the mean of its question's; what a tool wrote carries no weight. Rewards, and the pass@k of the stage, are
of a task's lenient score where it has one. evals/README.md says what the switches of `rl` do, `policy.py` the losses.

DPO (rl.objective=dpo, arXiv 2305.18290) samples from the model that RL began with, and learns to prefer the first right
answer to the first wrong one, of questions that have both; its probabilities are not normalised by length.
"""

from typing import cast

import jax

from evals.tasks import available, load_task
from evals.tasks.base import ScoredTask
from nanochat_jax.checkpoint import read_done
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import cast_matrices, graph_of, merge
from nanochat_jax.stages import common
from nanochat_jax.stages.learner import Learner
from nanochat_jax.stages.rollouts import Questions, Sampler, pairs, pass_at_k, training_batch
from nanochat_jax.stages.run import Run
from nanochat_jax.training import memory


def load_questions(run: Run, shares: dict[str, int], split: str) -> Questions:
    """The questions of a split. UserError for a task whose answers are not generated."""
    tasks = {n: load_task(n, split=split, data=run.config.data, cache_dir=run.cache_dir) for n in shares}
    for name, task in tasks.items():
        if task.kind != "generative":
            raise UserError(f"rl.task={name} is {task.kind}; RL needs tasks whose answers are generated, such as gsm8k")
        if not len(task):
            raise UserError(f"rl.task={name} has no questions in its {split} split; take another task")
    return Questions(cast(dict[str, ScoredTask], tasks), shares, run.config.seed)


def main(run: Run) -> dict:
    cfg, tok, seed = run.config.rl, run.tokenizer, run.config.seed

    # questions
    named = cfg.task or ("gsm8k" if "gsm8k" in available(run.config.data, "train") else "arithmetic")
    shares = named if isinstance(named, dict) else {named: 1}
    questions, held_out = (load_questions(run, shares, split) for split in ("train", "test"))
    before = next((s for s in ("sft", "mid", "base") if read_done(run.dir / s)), "sft")

    # policy, reference and optimizer
    steps = cfg.steps or max(1, len(questions) // cfg.questions)
    rollouts_per_step = cfg.questions * cfg.samples
    updates = steps * cfg.epochs * cfg.minibatches
    batch_tokens, decay = run.config.base.batch_tokens or 2**19, cfg.optim.weight_decay or 0.0
    optimizer = common.make_optimizer(run, cfg.optim, updates, batch_tokens, decay)
    reference = None
    if cfg.kl is not None or cfg.objective == "dpo":
        start = run.params_of(before)
        start = jax.device_put(start, sharding.tree_shardings(start, run.mesh))
        reference = cast_matrices(start, run.training_dtype)
    sampler = Sampler(run, merge(graph_of(run.gpt_config, run.dtype), run.params_of(before)), slots=rollouts_per_step)
    learner = Learner(run, optimizer, reference, held=memory.held_bytes((reference, sampler.engine.arrays)))
    names = " and ".join(shares)
    run.log.say(f"rl: {steps} steps of {cfg.questions} questions x {cfg.samples} samples of {names}, from {before}")
    for name, task in questions.tasks.items():
        if task.lenient:
            run.log.say(f"rl: rewards of {name} are of the lenient score; it admits {task.lenient}")

    # training
    def next_batch(step: int, params: dict) -> tuple[list[dict], dict]:
        chosen = [questions[step * cfg.questions + i] for i in range(cfg.questions)]
        policy = params if reference is None or cfg.objective != "dpo" else reference
        rollouts = sampler(policy, chosen, cfg.samples, lambda q, s: common.mix_seed(seed, step, q, s))
        selected = pairs(rollouts) if cfg.objective == "dpo" else rollouts
        arrays = training_batch(selected, tok.assistant_end, tok.bos, run.config.model.sequence_len, cfg.zscore)
        parts, metrics = learner.prepare(params, arrays)
        return parts, {**rollouts.metrics(chosen), **metrics}

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
        evaluate=evaluate,
        extra=lambda: {"task": named, "from": before},
    )

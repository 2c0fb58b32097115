"""Pretraining: next-token prediction on documents, packed by best fit so that every row starts with <|bos|>."""

from __future__ import annotations

from nanochat_jax import scaling
from nanochat_jax.data.loader import Loader
from nanochat_jax.stages import common


def main(run: common.Run) -> dict:
    cfg = run.config.base
    plan = scaling.plan(
        run.gpt_config,
        ratio=cfg.ratio,
        tokens=cfg.tokens,
        batch_tokens=cfg.batch_tokens,
        head_dim=run.config.model.head_dim,
    )
    decay = plan.weight_decay if cfg.optim.weight_decay is None else cfg.optim.weight_decay
    train_rows, val_rows = run.packed("train"), run.packed("val")
    evaluate = common.bpb_evaluator(run, val_rows)
    accumulation, rows = common.split_rows(
        "base", plan.batch_tokens, run.config.model.sequence_len, cfg.micro_batch, run.mesh
    )
    run.log.say(
        f"base: {plan.steps} steps of {plan.batch_tokens:,} tokens ({accumulation} x {rows} rows), "
        f"{scaling.param_counts(run.gpt_config)['total']:,} parameters, {len(train_rows):,} rows of data"
    )
    with Loader(train_rows, seed=run.config.seed, batch_rows=accumulation * rows) as loader:
        return common.train_stage(
            run,
            "base",
            init=None,
            optimizer=common.make_optimizer(run, cfg.optim, plan.steps, plan.batch_tokens, decay),
            steps=plan.steps,
            next_batch=lambda step, _: (common.place(loader.at(step), accumulation, run.mesh), {}),
            tokens_per_step=plan.batch_tokens,
            save_every=cfg.save_every,
            evaluate=evaluate,
            eval_every=cfg.eval_every,
            extra={"batch_tokens": plan.batch_tokens, "epochs": plan.steps * accumulation * rows / len(train_rows)},
        )

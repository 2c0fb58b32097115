"""Pretraining: next-token prediction on documents, packed by best fit so that every row starts with <|bos|>."""

from evals.core import evaluate_core
from nanochat_jax.data.bundle import find_bundle
from nanochat_jax.model import scaling
from nanochat_jax.model.loss import sampler
from nanochat_jax.stages import common
from nanochat_jax.stages.preview import preview
from nanochat_jax.stages.run import Run
from nanochat_jax.stages.step import compile_step

CORE_EXAMPLES = 500  # a task, while training; the eval stage takes all


def _evaluator(run: Run, val_rows):
    """Bits per byte and samples, and every core_every steps CORE as well, where its bundle is at hand."""
    bpb, every = common.bpb_evaluator(run, val_rows), run.config.base.core_every
    bundle = find_bundle(run.config, run.cache_dir)

    def evaluate(step: int, params: dict) -> dict:
        out = bpb(step, params) | preview(run, params)
        if bundle and every and step and step % every == 0:
            scorer = common.scorer(run, params, run.config.evals.batch)
            out["core"] = evaluate_core(scorer, run.tokenizer, bundle, CORE_EXAMPLES, run.log.write)["core_metric"]
        return out

    return evaluate


def main(run: Run) -> dict:
    cfg = run.config.base
    plan = scaling.base_plan(run.gpt_config, run.config)
    decay = plan.weight_decay if cfg.optim.weight_decay is None else cfg.optim.weight_decay
    optimizer = common.make_optimizer(run, cfg.optim, plan.steps, plan.batch_tokens, decay)
    wanted = plan.steps * plan.batch_tokens // run.config.model.sequence_len
    with run.packed("val") as val_rows, run.packed("train", wanted) as train_rows:
        draw = sampler(run.gpt_config.vocab_size, cfg.vocab_sample)
        step = compile_step(run, "base", optimizer, plan.batch_tokens, cfg.fp8, draw=draw)
        run.log.say(
            f"base: {plan.steps} steps of {plan.batch_tokens:,} tokens ({step.accumulation} x {step.rows} rows), "
            f"{scaling.param_counts(run.gpt_config)['total']:,} parameters, {run.training_dtype}"
        )
        with common.loader(run, train_rows, step) as loader:
            return common.train_stage(
                run,
                "base",
                init=None,
                optimizer=optimizer,
                step_fn=step.run,
                steps=plan.steps,
                next_batch=lambda i, _: (loader.at(i), {}),
                tokens_per_step=plan.batch_tokens,
                evaluate=_evaluator(run, val_rows),
                rows=train_rows,
                extra=lambda: {
                    "batch_tokens": plan.batch_tokens,
                    "epochs": wanted / len(train_rows),
                    "packed": {k: train_rows.manifest[k] for k in ("documents", "tokens", "tokens_cropped")},
                },
            )

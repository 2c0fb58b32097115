"""mid and sft: the same loop over packed conversations, for as many epochs as asked.

mid continues pretraining on conversations, by default with every token a target; sft learns from the assistant's tokens
alone. Rows are padded where no further conversation fits.
"""

from __future__ import annotations

from evals.tasks import VERSION, load_task
from evals.tasks.mixtures import mid_mixture, sft_mixture
from nanochat_jax import hosts
from nanochat_jax.checkpoint import read_done
from nanochat_jax.config import FinetuneConfig, to_dict
from nanochat_jax.data.mixture import Mixture
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.data.packing import pack_conversations
from nanochat_jax.stages import common


def _dataset(run: common.Run, name: str, cfg: FinetuneConfig) -> PackedDataset:
    recipe = (mid_mixture if name == "mid" else sft_mixture)(run.config.data, override=cfg.mixture)
    tasks = [
        (load_task(task, split=split, data=run.config.data, cache_dir=run.cache_dir), times)
        for task, split, times in recipe
    ]
    run.log.say(
        f"{name}: " + ", ".join(f"{t.name} {len(t):,} x {n}" if n > 0 else f"{t.name} {-n:,}" for t, n in tasks)
    )
    return pack_conversations(
        Mixture(tasks, seed=run.config.seed),
        run.tokenizer,
        run.config.model.sequence_len,
        run.cache_dir / "packed",
        all_targets=cfg.all_targets,
        key=[VERSION, to_dict(run.config.data), run.config.seed, [[t.name, len(t), n] for t, n in tasks]],
        max_rows=cfg.max_rows,
        workers=run.config.data.pack_workers,
        log=run.log.say,
    )


def main(run: common.Run, name: str) -> dict:
    cfg: FinetuneConfig = getattr(run.config, name)
    before = "mid" if name == "sft" and read_done(run.dir / "mid") else "base"
    with hosts.main_first(f"{name} packed"):
        dataset = _dataset(run, name, cfg)
    batch_tokens = (
        cfg.batch_tokens
        or run.config.base.batch_tokens
        or ((read_done(run.dir / "base") or read_done(run.dir / before))["batch_tokens"])
    )
    batch_rows = batch_tokens // run.config.model.sequence_len
    steps = max(1, round(cfg.epochs * len(dataset) / max(batch_rows, 1)))
    optimizer = common.make_optimizer(run, cfg.optim, steps, batch_tokens, cfg.optim.weight_decay or 0.0)
    step = common.compile_step(run, name, optimizer, batch_tokens, cfg.micro_batch)
    run.log.say(f"{name}: {steps} steps of {batch_tokens:,} tokens over {len(dataset):,} rows, from {before}")
    with run.packed("val") as val_rows, common.loader(run, dataset, step) as loader:
        return common.train_stage(
            run,
            name,
            init=lambda: run.params_of(before),
            optimizer=optimizer,
            step_fn=step.run,
            steps=steps,
            next_batch=lambda i, _: (loader.at(i), {}),
            tokens_per_step=batch_tokens,
            save_every=cfg.save_every,
            evaluate=common.bpb_evaluator(run, val_rows),
            eval_every=cfg.eval_every,
            extra=lambda: {
                "from": before,
                "batch_tokens": batch_tokens,
                "packed": {k: dataset.manifest[k] for k in ("conversations", "cropped", "dropped")},
            },
        )

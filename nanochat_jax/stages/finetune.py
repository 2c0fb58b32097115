"""mid and sft: the same loop over packed conversations, for as many epochs as asked.

mid continues pretraining on conversations, by default with every token a target; sft learns from the assistant's tokens
alone. Rows are padded where no further conversation fits. With a lora_rank, a low-rank change alone is learnt
(`lora.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from evals.tasks import load_task, made_by
from evals.tasks.base import Task
from evals.tasks.mixtures import mixture
from nanochat_jax import checkpoint
from nanochat_jax.checkpoint import read_done
from nanochat_jax.config import FinetuneConfig
from nanochat_jax.data.mixture import Mixture
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.data.packing import pack_conversations
from nanochat_jax.files import content_hashes
from nanochat_jax.mesh import hosts, sharding
from nanochat_jax.model import lora
from nanochat_jax.model.gpt import cast_matrices
from nanochat_jax.stages import common
from nanochat_jax.stages.run import Run
from nanochat_jax.stages.step import Step, compile_step
from nanochat_jax.training import optim


def load_tasks(run: Run, name: str) -> list[tuple[Task, int]]:
    """The tasks that mid or sft trains on, and how many times, or -n for n conversations of it."""
    data, cache = run.config.data, run.cache_dir
    chosen = mixture(name, data, getattr(run.config, name).mixture)
    tasks = [(load_task(task, split=split, data=data, cache_dir=cache), times) for task, split, times in chosen]
    for note in (note for task, _ in tasks for note in task.notes):
        run.log.say(note)
    return tasks


def _dataset(run: Run, name: str, cfg: FinetuneConfig) -> PackedDataset:
    tasks = load_tasks(run, name)
    parts = (f"{t.name} {len(t):,} x {n}" if n > 0 else f"{t.name} {-n:,}" for t, n in tasks)
    run.log.say(f"{name}: {', '.join(parts)}")
    memory = run.cache_dir / "hashes.json"
    return pack_conversations(
        Mixture(tasks, seed=run.config.seed),
        run.tokenizer,
        run.config.model.sequence_len,
        run.cache_dir / "packed",
        all_targets=cfg.all_targets,
        key=[made_by(), run.config.seed, [[t.name, n, t.key, *content_hashes(t.files, memory)] for t, n in tasks]],
        max_rows=cfg.max_rows,
        workers=run.config.data.pack_workers,
        log=run.log.say,
    )


def _lora_arguments(run: Run, name: str, before: str, rank: int, step: Step, evaluate: Callable) -> dict:
    """The arguments of `train_stage` that differ where adapters of stage `before` are trained."""
    saved = checkpoint.adapters_of(run.dir / name)
    loaded = checkpoint.load_changed(run.dir, name, saved) if saved else checkpoint.load_model(run.dir, before)
    params = common.from_host(loaded.params)
    split = sharding.tree_shardings(params, run.mesh)
    frozen = jax.jit(lambda params: cast_matrices(params, run.training_dtype), out_shardings=split)(params)

    @functools.partial(jax.jit, out_shardings=split)
    def whole(frozen, adapters):
        return lora.merged(frozen, cast_matrices(adapters, run.training_dtype))

    return {
        "init": lambda: lora.init(run.gpt_config, rank, common.mix_seed(run.config.seed, *name.encode())),
        "step_fn": lambda state, batch: step.run(state, batch, frozen),
        "evaluate": lambda i, adapters: evaluate(i, whole(frozen, adapters)),
        "lora_rank": rank,
        "meta": {"lora": {"rank": rank, "from": loaded.stage, "identity": loaded.identity}},
    }


def main(run: Run, name: str) -> dict:
    cfg: FinetuneConfig = getattr(run.config, name)
    rank = cfg.lora_rank
    before = "mid" if name == "sft" and read_done(run.dir / "mid") else "base"
    before = (checkpoint.adapters_of(run.dir / name) or {"from": before})["from"]

    # data
    with hosts.main_first(f"{name} packed"):
        dataset = _dataset(run, name, cfg)
    batch_tokens = cfg.batch_tokens or run.config.base.batch_tokens
    if not batch_tokens:
        batch_tokens = (read_done(run.dir / "base") or read_done(run.dir / before) or {})["batch_tokens"]
    batch_rows = batch_tokens // run.config.model.sequence_len
    steps = max(1, round(cfg.epochs * len(dataset) / max(batch_rows, 1)))

    # optimizer and step
    if rank:
        schedules = optim.make_schedules(cfg.optim, steps, 0.0, run.config.model.arch)
        optimizer = optim.adamw(cfg.optim.lr_scale * cfg.lora_lr, lora.BETAS, 0.0, schedules.lr)
    else:
        optimizer = common.make_optimizer(run, cfg.optim, steps, batch_tokens, cfg.optim.weight_decay or 0.0)
    step = compile_step(run, name, optimizer, batch_tokens, lora_rank=rank)
    run.log.say(
        f"{name}: {steps} steps of {batch_tokens:,} tokens over {len(dataset):,} rows, from {before}"
        + (f", adapters of rank {rank} alone" if rank else "")
    )

    # training
    with run.packed("val") as val_rows, common.loader(run, dataset, step) as loader:
        evaluate = common.bpb_evaluator(run, val_rows)
        arguments: dict[str, Any] = {"init": lambda: run.params_of(before), "step_fn": step.run, "evaluate": evaluate}
        if rank:
            arguments = _lora_arguments(run, name, before, rank, step, evaluate)
        return common.train_stage(
            run,
            name,
            **arguments,
            optimizer=optimizer,
            steps=steps,
            next_batch=lambda i, _: (loader.at(i), {}),
            tokens_per_step=batch_tokens,
            rows=dataset,
            extra=lambda: {
                "from": before,
                "batch_tokens": batch_tokens,
                "packed": {k: dataset.manifest[k] for k in ("conversations", "cropped", "dropped")},
            },
        )

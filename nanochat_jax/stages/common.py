"""What the stages share: optimizer, batches, evaluators; and `train_stage`, the course of a stage from resume to done.

The run directory is in `run.py`, the compiled train step in `step.py`.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from evals.bpb import evaluate_bpb
from evals.scoring import Scorer
from nanochat_jax import checkpoint, devices
from nanochat_jax.config import OptimConfig, fingerprint
from nanochat_jax.data.loader import Loader
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts, sharding
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of, merge
from nanochat_jax.stages.run import Run
from nanochat_jax.stages.step import Step, abstract_state
from nanochat_jax.tracking.trace import traced
from nanochat_jax.tracking.tracking import Tracker, system_info
from nanochat_jax.training import loop, optim

# -------------------------------------------------------------------------------------- optimizer, batches, evaluators


def make_optimizer(run: Run, cfg: OptimConfig, steps: int, batch_tokens: int, weight_decay: float):
    schedules = optim.make_schedules(cfg, steps, weight_decay, run.config.model.arch)
    dtype, light = run.training_dtype, run.config.optimizer_state == "light"
    return optim.make_optimizer(run.gpt_config, cfg, schedules, batch_tokens, dtype, run.mesh, light)


def loader(run: Run, dataset: PackedDataset, step: Step) -> Loader:
    split = sharding.rows(run.mesh, leading=1)
    return Loader(dataset, seed=run.config.seed, accumulation=step.accumulation, rows=step.rows, sharding=split)


def scorer(run: Run, params: dict, rows: int) -> Scorer:
    """Scores texts with `params`, `rows` of them at a time on each device."""
    model = merge(graph_of(run.gpt_config, run.dtype), params)
    return Scorer(model, rows * sharding.data_parallel(run.mesh), run.mesh)


def bpb_evaluator(run: Run, rows: PackedDataset) -> Callable[[int, dict], dict]:
    """evaluate(step, params) -> {"val_bpb", "val_loss"}: bits per byte and nats per token over all of `rows`."""

    def evaluate(step: int, params: dict) -> dict:
        found = evaluate_bpb(scorer(run, params, run.config.base.micro_batch), rows, run.tokenizer)
        return {"val_bpb": found["bpb"], "val_loss": found["loss"]}

    return evaluate


# ------------------------------------------------------------------------------------------------------------ training


def train_stage(
    run: Run,
    name: str,
    *,
    init: Callable[[], dict] | None,
    optimizer,
    step_fn: Callable,
    steps: int,
    next_batch: Callable,
    tokens_per_step: int,
    evaluate: Callable,
    extra: Callable[[], dict],
    rows: PackedDataset | None = None,
    lora_rank: int | None = None,
    meta: dict | None = None,
) -> dict:
    """Trains stage `name` to its end and writes its done mark; returns the mark.

    init: gives the first parameters, which are adapters where lora_rank is set; None: fresh ones. extra: called at the
    end, gives more of the mark; meta: more of every checkpoint's. rows: what batches are made of.
    """
    stage_dir, settings, tracking = run.dir / name, getattr(run.config, name), run.config.tracking

    # resume, or begin
    checkpointer = checkpoint.Checkpointer(stage_dir / "checkpoints", run.config.checkpoints, say=run.log.say)
    state, saved = _resume(run, name, checkpointer, init, optimizer, lora_rank)
    if saved:
        run.log.say(f"{name}: resumes from step {int(state.step)} of {steps}")
        if rows and saved.get("rows", rows.path.name) != rows.path.name:
            run.log.say(f"{name}: the data changed, or how rows are made of it; the steps before saw other rows")
    meta = {
        "stage": name,
        "rows": rows and rows.path.name,
        "seed": run.config.seed,
        "tokenizer": run.tokenizer.hash,
        "config": fingerprint(run.config),
        **(meta or {}),
        **{key: saved[key] for key in ("seconds", "last") if saved},
    }

    # train
    on_spike = run.stop.ask if tracking.stop_on_spike else None
    tracker = Tracker(run.dir, name, steps, run.log, int(state.step), tracking, on_spike)
    flops = scaling.flops_per_token(run.gpt_config, getattr(settings, "vocab_sample", None))
    peak = (devices.peak_flops(jax.devices()[0].device_kind) or 0.0) * jax.device_count()
    try:
        trace_at = tracking.trace_at if hosts.is_main() else None
        with traced(step_fn, stage_dir / "trace", int(state.step), trace_at) as step_fn:
            state, metrics = loop.fit(
                state,
                step_fn=step_fn,
                next_batch=next_batch,
                steps=steps,
                save_every=settings.save_every,
                checkpointer=checkpointer,
                tracker=tracker,
                rates=functools.partial(loop.rates, tokens_per_step, flops, peak),
                meta=meta,
                stop=run.stop,
                evaluate=tracker.elsewhere()(evaluate),  # which is no stall
                eval_every=settings.eval_every,
            )
    finally:
        try:
            tracker.close()
        finally:
            checkpointer.close()  # whatever else failed: it may be writing still

    # leave a done mark
    done = {
        "stage": name,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": metrics.pop("seconds"),
        "metrics": metrics,
        "system": {**system_info(), "training_dtype": str(run.training_dtype)},
        **extra(),
    }
    if hosts.is_main():
        checkpoint.write_done(stage_dir, done)
    return done


def _resume(run: Run, name: str, checkpointer, init: Callable[[], dict] | None, optimizer, lora_rank: int | None):
    """(train state, meta) of a stage's newest checkpoint, or (a fresh state, {}). UserError where it was trained with
    another tokenizer."""
    if checkpointer.latest() is None:
        params = from_host(init()) if init else None
        return loop.init_state(run.gpt_config, optimizer, run.config.seed, run.mesh, params), {}
    state, saved = checkpointer.restore(abstract_state(run, optimizer, lora_rank))
    if saved["tokenizer"] != run.tokenizer.hash:
        raise UserError(
            f"{run.dir / 'tokenizer'} is not the tokenizer that stage {name} began with; put that one back, or "
            "take another run directory"
        )
    return state, saved


def from_host(params: dict) -> dict:
    """params, on several hosts as NumPy arrays: only from a host's memory can they be copied to all devices."""
    return jax.tree.map(np.asarray, params) if hosts.count() > 1 else params


# ------------------------------------------------------------------------------------------------------ random numbers


def mix_seed(*numbers: int) -> int:
    """31 bits that depend on all of the numbers and on their places."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


@functools.lru_cache(maxsize=64)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A shuffle of range(n) that depends on the arguments alone. Not to be written to."""
    return np.random.default_rng([seed, epoch]).permutation(n)

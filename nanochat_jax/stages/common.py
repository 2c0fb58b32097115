"""What every training stage does: build the step, resume the state or begin it, train, leave a done mark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from evals.bpb import evaluate_bpb
from evals.scoring import Scorer
from nanochat_jax import checkpoint, devices
from nanochat_jax.config import GPTConfig, OptimConfig, RunConfig, fingerprint
from nanochat_jax.data.loader import Loader
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.data.packing import pack_split
from nanochat_jax.data.sources import open_documents
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts, sharding
from nanochat_jax.mesh.preemption import Stop
from nanochat_jax.model import attention, lora, scaling
from nanochat_jax.model.gpt import cast_matrices, graph_of, init_params, merge
from nanochat_jax.tracking.trace import traced
from nanochat_jax.tracking.tracking import RunLog, Tracker, system_info
from nanochat_jax.training import loop, memory, optim
from tokenizer import Tokenizer, load_tokenizer


@dataclass
class Run:
    """A run directory with what its stages share. Everything costly is made when first asked for."""

    dir: Path
    config: RunConfig
    log: RunLog
    stop: Stop

    @cached_property
    def cache_dir(self) -> Path:
        return Path(self.config.data.cache_dir) if self.config.data.cache_dir else self.dir.parent / "cache"

    @cached_property
    def documents(self):
        return open_documents(self.config.data, self.cache_dir)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.dir / "tokenizer")

    @cached_property
    def gpt_config(self) -> GPTConfig:
        return scaling.gpt_config(self.config.model, self.tokenizer.vocab_size)

    @cached_property
    def dtype(self):
        """For evaluation and sampling."""
        return devices.compute_dtype(self.config.dtype)

    @cached_property
    def training_dtype(self):
        return devices.training_dtype(self.config.dtype)

    @cached_property
    def mesh(self):
        return sharding.make_mesh(self.config.mesh)

    def packed(self, split: str, rows: int | None = None) -> PackedDataset:
        """The packed rows of the documents' train or val split, `rows` of them at most. Close it: packing may
        still run."""
        return pack_split(
            self.config, self.documents, self.tokenizer, self.cache_dir, split, rows=rows, log=self.log.say
        )

    def params_of(self, stage: str) -> dict:
        """The parameters that `stage` ended with, as a nested dict."""
        loaded = checkpoint.load_model(self.dir, stage)
        return nnx.to_pure_dict(nnx.split(loaded.model)[1])


def rows_per_device(name: str, batch_tokens: int, sequence_len: int, mesh) -> int:
    """Rows of a batch that each data-parallel device takes. UserError where they cannot be shared evenly."""
    rows, shares = batch_tokens // sequence_len, sharding.data_parallel(mesh)
    if rows < 1 or rows % shares:
        raise UserError(
            f"{name}: a batch of {batch_tokens} tokens is {rows} rows of {sequence_len}, which {shares} "
            f"data-parallel devices cannot share; set {name}.batch_tokens to a multiple of {shares * sequence_len}"
        )
    return rows // shares


@dataclass(frozen=True)
class Step:
    """A compiled train step and the shape of its batches: accumulation x rows over the whole mesh."""

    run: Callable
    accumulation: int
    rows: int


def compile_step(
    run: Run,
    name: str,
    optimizer,
    batch_tokens: int,
    micro_batch: int,
    eight_bits: bool = False,
    lora_rank: int | None = None,
) -> Step:
    """The step of a batch of `batch_tokens`, in micro-batches of at most micro_batch rows a device that fit it.

    eight_bits: with its products in 8-bit floats. lora_rank: of adapters; it then takes the frozen parameters as well.
    """
    length = run.config.model.sequence_len
    per_device = rows_per_device(name, batch_tokens, length, run.mesh)
    graph = graph_of(run.gpt_config, run.training_dtype, eight_bits)
    join: Callable | None = None
    frozen: tuple = ()
    if lora_rank:
        fixed = jax.eval_shape(lambda: cast_matrices(init_params(run.gpt_config, 0), run.training_dtype))
        join, frozen = lora.merged, (sharding.abstract(fixed, run.mesh),)
    step = loop.make_step(graph, optimizer, run.training_dtype, run.mesh, join)
    arrays = {"tokens": np.int32, "targets": np.int32}
    state = abstract_state(run, optimizer, lora_rank)
    return fit_step(run, name, step, state, arrays, (per_device, length), micro_batch, frozen=frozen)


def fit_step(
    run: Run,
    name: str,
    step,
    state,
    arrays: dict,
    shape: tuple[int, int],
    micro_batch: int,
    held: int = 0,
    frozen: tuple = (),
) -> Step:
    """A jitted `step` compiled for the abstract `state` and a batch of `arrays` (name -> type), each of `shape` on each
    data-parallel device, in micro-batches of at most micro_batch rows that fit beside `held` bytes. frozen: further
    abstract arguments of it, if any.

    The compiler's own analysis says what fits, before anything runs; accumulation makes up the rest.
    """
    (per_device, length), mesh, compiled = shape, run.mesh, {}
    sizes = memory.micro_batches(per_device, micro_batch)
    attention.choose(
        attention.shapes_of(run.gpt_config, length, run.training_dtype),
        sizes[0],
        run.cache_dir,
        run.config.attention,
        split_heads=mesh.shape["tensor"] > 1,
        say=run.log.write,
    )

    def needed(size: int) -> int:
        whole = (per_device // size, size * sharding.data_parallel(mesh), length)
        split = sharding.rows(mesh, leading=1)
        batch = {k: jax.ShapeDtypeStruct(whole, dtype, sharding=split) for k, dtype in arrays.items()}
        compiled[size] = step.lower(state, batch, *frozen).compile()
        return memory.needed_bytes(compiled[size])

    limit = memory.device_bytes() - held
    size = memory.largest_that_fits(sizes, needed, limit, name)
    need = memory.needed_bytes(compiled[size])
    run.log.write(f"{name}: {size} rows at a time need {need / 1e9:.2f} of {limit / 1e9:.2f} GB on each device")
    return Step(compiled[size], per_device // size, size * sharding.data_parallel(mesh))


def abstract_state(run: Run, optimizer, lora_rank: int | None = None):
    """The train state, of adapters if lora_rank is set, as shapes, types and shardings."""
    cfg, seed = run.gpt_config, run.config.seed

    def state():
        params = lora.init(cfg, lora_rank, seed) if lora_rank else None
        return loop.init_state(cfg, optimizer, seed, run.mesh, params)

    made = jax.eval_shape(state)
    return sharding.abstract(made, run.mesh)


def place(batch: dict, accumulation: int, mesh) -> dict:
    """Host arrays (rows, T) as device arrays (accumulation, rows / accumulation, T), rows split over the mesh."""
    put = sharding.rows(mesh, leading=1)
    return {k: jax.device_put(v.reshape(accumulation, -1, v.shape[-1]), put) for k, v in batch.items()}


def loader(run: Run, dataset: PackedDataset, step: Step) -> Loader:
    """The batches of a compiled step."""
    return Loader(
        dataset,
        seed=run.config.seed,
        accumulation=step.accumulation,
        rows=step.rows,
        sharding=sharding.rows(run.mesh, leading=1),
    )


def scorer(run: Run, params: dict, rows: int) -> Scorer:
    """What scores texts with `params`, `rows` of them at a time on each device."""
    model = merge(graph_of(run.gpt_config, run.dtype), params)
    return Scorer(model, rows * sharding.data_parallel(run.mesh), run.mesh)


def bpb_evaluator(run: Run, rows: PackedDataset) -> Callable[[int, dict], dict]:
    """evaluate(step, params) -> {"val_bpb", "val_loss"}: bits per byte and nats per token over all of `rows`."""

    def evaluate(step: int, params: dict) -> dict:
        made = scorer(run, params, run.config.base.micro_batch)
        found = evaluate_bpb(made, rows, run.tokenizer)
        return {"val_bpb": found["bpb"], "val_loss": found["loss"]}

    return evaluate


def mix_seed(*numbers: int) -> int:
    """31 bits that depend on all of the numbers and on their places."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def make_optimizer(run: Run, cfg: OptimConfig, steps: int, batch_tokens: int, weight_decay: float):
    schedules = optim.make_schedules(cfg, steps, weight_decay, run.config.model.arch)
    dtype = run.training_dtype
    return optim.make_optimizer(run.gpt_config, cfg, schedules, batch_tokens, orth_dtype=dtype, mesh=run.mesh)


def _resume(run: Run, name: str, checkpointer, init: Callable[[], dict] | None, optimizer, lora_rank: int | None):
    """The train state of a stage's newest checkpoint and that checkpoint's meta; a fresh state and {} where there is
    none. UserError where it was trained with another tokenizer."""
    if checkpointer.latest() is None:
        params = init() if init else None
        if hosts.count() > 1:  # what one host holds can be copied to all devices only from its memory
            params = jax.tree.map(np.asarray, params)
        return loop.init_state(run.gpt_config, optimizer, run.config.seed, run.mesh, params), {}
    state, saved = checkpointer.restore(abstract_state(run, optimizer, lora_rank))
    if saved["tokenizer"] != run.tokenizer.hash:
        raise UserError(
            f"{run.dir / 'tokenizer'} is not the tokenizer that stage {name} began with; put that one back, or "
            f"remove {run.dir / name} to train the stage anew"
        )
    return state, saved


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
    save_every: int,
    evaluate: Callable | None = None,
    eval_every: int = 0,
    extra: Callable[[], dict] = dict,
    lora_rank: int | None = None,
    meta: dict | None = None,
) -> dict:
    """Trains stage `name` to its end and writes its done mark; returns the mark.

    `init` gives the first parameters, which are adapters where lora_rank is set; `extra`, asked at the end, goes into
    the mark, and `meta` into every checkpoint.
    """
    cfg, stage_dir = run.gpt_config, run.dir / name
    checkpointer = checkpoint.Checkpointer(stage_dir / "checkpoints", run.config.checkpoints, say=run.log.say)
    state, saved = _resume(run, name, checkpointer, init, optimizer, lora_rank)
    if saved:
        run.log.say(f"{name}: goes on from step {int(state.step)} of {steps}")
    meta = {
        "stage": name,
        "seed": run.config.seed,
        "tokenizer": run.tokenizer.hash,
        "config": fingerprint(run.config),
        **(meta or {}),
        **{key: saved[key] for key in ("seconds", "last") if saved},
    }
    settings = run.config.tracking
    on_spike = run.stop.ask if settings.stop_on_spike else None
    tracker = Tracker(run.dir, name, steps, run.log, int(state.step), settings, on_spike)

    def evaluate_untimed(evaluate: Callable, step: int, params: dict) -> dict:
        with tracker.elsewhere():
            return evaluate(step, params)

    peak = devices.peak_flops(jax.devices()[0].device_kind)
    first = settings.trace_at if hosts.is_main() else None
    try:
        with traced(step_fn, stage_dir / "trace", int(state.step), first) as step_fn:
            state, metrics = loop.fit(
                state,
                step_fn=step_fn,
                next_batch=next_batch,
                steps=steps,
                save_every=save_every,
                checkpointer=checkpointer,
                tracker=tracker,
                accounting=loop.Accounting(
                    tokens_per_step, scaling.flops_per_token(cfg), peak * jax.device_count() if peak else None
                ),
                meta=meta,
                stop=run.stop,
                evaluate=evaluate and functools.partial(evaluate_untimed, evaluate),
                eval_every=eval_every,
            )
    finally:
        tracker.close()
        checkpointer.close()
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


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A shuffle of range(n) that is a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)

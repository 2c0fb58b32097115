"""What a step of the base stage needs of a device's memory, by kind of array, before it runs: as the compiler sees it,
or by a formula that was fitted to that for H100s."""

import contextlib
import functools
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from nanochat_jax import devices
from nanochat_jax.config import GPTConfig, RunConfig
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.planning import targets
from nanochat_jax.training import loop, memory, optim


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, with `rows` at a time; rows is 0 where not even one fits."""

    parameters: float  # float32 masters, and what is cast of them for the products
    optimizer: float
    gradients: float
    activations: float  # and all else that is temporary
    rows: int
    source: str

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.gradients + self.activations


def state_bytes(cfg: GPTConfig) -> int:
    """Parameters and moments in float32: AdamW has two of tables, head and scalars, Muon one of matrices."""
    counts = scaling.param_counts(cfg)
    return 4 * (3 * counts["total"] - counts["transformer_matrices"])


@dataclass(frozen=True)
class Machine:
    """What is planned for. gpu: a key of targets.GPUS, None for the devices at hand; price: $ an hour of all of them,
    NaN where it is not known."""

    gpu: str | None
    count: int
    price: float = math.nan

    @property
    def kind(self) -> str:
        return targets.GPUS[self.gpu].name if self.gpu else jax.devices()[0].device_kind

    @property
    def limit(self) -> int:
        """Bytes of a device that may be planned."""
        if self.gpu:
            return int(memory.MARGIN * devices.POOL * targets.GPUS[self.gpu].gb * 1e9)
        return memory.device_bytes()


@dataclass
class Job:
    """The base stage of a configuration on a machine. UserError where its devices cannot share the rows of a batch.

    base: its tokens, batch and steps; mesh: devices along data, fsdp and tensor; per_device: rows of a batch that a
    device takes; sizes: micro-batches that it may take them in, the largest first.
    """

    config: RunConfig
    on: Machine

    def __post_init__(self):
        base, model = self.config.base, self.config.model
        self.cfg = scaling.gpt_config(model, self.config.tokenizer.vocab_size)
        self.base = scaling.plan(
            self.cfg, ratio=base.ratio, tokens=base.tokens, batch_tokens=base.batch_tokens, head_dim=model.head_dim
        )
        self.mesh = data, fsdp, _ = tuple(sharding.make_mesh(self.config.mesh, np.arange(self.on.count)).shape.values())
        rows = self.base.batch_tokens // self.cfg.sequence_len
        if rows < 1 or rows % (data * fsdp):
            raise UserError(
                f"base: a batch of {rows} rows cannot be shared by {data * fsdp} devices; set base.batch_tokens to a "
                f"multiple of {data * fsdp * self.cfg.sequence_len}"
            )
        self.per_device = rows // (data * fsdp)
        self.sizes = memory.micro_batches(self.per_device, base.micro_batch)


# bytes of activations for a value of the residual stream: in each layer, and once
EACH_LAYER, ONCE = 24.5, 170.0


def estimate(job: Job, rows: int) -> Memory:
    """By formula; for bfloat16 on GPUs, whose attention keeps no scores.

    Fitted to the steps that targets.py compiles for an H100, d12 to d26 and the classic d20, on one device: within 5 %
    with 4 rows and more, up to 12 % too much with one, where activations and gradients share what they need.
    """
    data, fsdp, tensor = job.mesh
    counts = scaling.param_counts(job.cfg)
    whole = counts["total"] / tensor  # values of the parameters that a device sees once they are gathered
    values = rows * job.cfg.sequence_len * job.cfg.n_embd / tensor
    return Memory(
        parameters=4 * whole / fsdp + 2 * whole,
        optimizer=(state_bytes(job.cfg) - 4 * counts["total"]) / (data * fsdp * tensor),
        gradients=(8 if job.per_device > rows else 4) * whole,  # of a micro-batch, and their sum
        activations=values * (EACH_LAYER * job.cfg.n_layer + ONCE),
        rows=rows,
        source="by formula",
    )


def estimated(job: Job) -> Memory:
    """With the largest micro-batch that fits by the formula."""
    found = [estimate(job, rows) for rows in job.sizes]
    return next((m for m in found if m.total <= job.on.limit), replace(found[-1], rows=0))


class Compiled:
    """The stage's own step, compiled. UserError where the libraries of a GPU that is not here are not installed."""

    def __init__(self, job: Job):
        config, plan, gpu = job.config, job.base, job.on.gpu
        rates = config.base.optim
        self.job, self.program = job, functools.cache(self._compile)
        self.mesh = sharding.make_mesh(config.mesh, targets.devices(gpu, job.on.count) if gpu else jax.devices())
        self.dtype = devices.training_dtype("bfloat16" if gpu and config.dtype == "auto" else config.dtype)
        schedules = optim.make_schedules(rates, plan.steps, plan.weight_decay, config.model.arch)
        self.optimizer = optim.make_optimizer(
            job.cfg, rates, schedules, plan.batch_tokens, orth_dtype=self.dtype, mesh=self.mesh
        )
        self.state = sharding.abstract(jax.eval_shape(self._fresh), self.mesh)

    def _fresh(self) -> loop.TrainState:
        return loop.init_state(self.job.cfg, self.optimizer, self.job.config.seed, self.mesh)

    def _batch(self, rows: int) -> jax.ShapeDtypeStruct:
        """Token ids of a step with `rows` at a time on a device."""
        shape = (self.job.per_device // rows, rows * sharding.data_parallel(self.mesh), self.job.cfg.sequence_len)
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.rows(self.mesh, leading=1))

    def _compile(self, rows: int) -> jax.stages.Compiled:
        job, batch = self.job, self._batch(rows)
        step: Any = loop.make_step(
            graph_of(job.cfg, self.dtype, job.config.base.fp8), self.optimizer, self.dtype, self.mesh
        )
        with targets.tracing(job.on.gpu) if job.on.gpu else contextlib.nullcontext():
            return step.lower(self.state, {"tokens": batch, "targets": batch}).compile()

    def memory(self) -> Memory:
        """With the largest micro-batch that fits, as the run will choose it."""
        sizes, rows = self.job.sizes, 0

        def needed(size: int) -> int:
            return memory.needed_bytes(self.program(size))

        with contextlib.suppress(UserError):
            rows = memory.largest_that_fits(sizes, needed, self.job.on.limit, "base")
        size = rows or sizes[-1]
        params, moments = _bytes(self.state.params), _bytes(self.state.opt_state)
        cast = 0 if self.dtype.itemsize == 4 else params / 2
        gradients = params * (2 if self.job.per_device > size else 1)  # of a micro-batch, and their sum
        rest = needed(size) - params - cast - moments - gradients
        return Memory(params + cast, moments, gradients, rest, rows, "by the compiled step")

    def seconds(self, rows: int, least: float = 5.0) -> float:
        """The median step time on batches of one token id, over `least` seconds and at least three steps, after one
        that is not counted."""
        state, program, took = self._fresh(), self.program(rows), list[float]()
        shape = self._batch(rows)
        batch = jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)
        while len(took) < 4 or sum(took) < least:
            began = time.perf_counter()
            state, metrics = program(state, {"tokens": batch, "targets": batch})
            jax.block_until_ready((state, metrics))
            took.append(time.perf_counter() - began)
        return statistics.median(took[1:])


def _bytes(tree) -> int:
    """Of abstract arrays, on one device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))

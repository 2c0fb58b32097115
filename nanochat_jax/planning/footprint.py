"""What a step of the base stage needs of a device's memory, by kind of array, before it runs: as the compiler sees it,
or by a formula that was fitted to that for H100s."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass, replace

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


def pretraining(config: RunConfig, cfg: GPTConfig) -> scaling.Plan:
    """Tokens, batch and steps of the base stage."""
    base = config.base
    return scaling.plan(
        cfg, ratio=base.ratio, tokens=base.tokens, batch_tokens=base.batch_tokens, head_dim=config.model.head_dim
    )


def state_bytes(cfg: GPTConfig) -> int:
    """Parameters and moments in float32: AdamW has two of tables, head and scalars, Muon one of matrices."""
    counts = scaling.param_counts(cfg)
    return 4 * (3 * counts["total"] - counts["transformer_matrices"])


@dataclass(frozen=True)
class Job:
    """The base stage of a configuration on `count` devices. UserError where its rows cannot be shared by them."""

    config: RunConfig
    cfg: GPTConfig
    gpu: str | None  # a key of targets.GPUS; None: the devices at hand
    count: int
    limit: int  # bytes of a device that may be planned

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Devices along data, fsdp and tensor."""
        return tuple(sharding.make_mesh(self.config.mesh, np.arange(self.count)).shape.values())

    @property
    def per_device(self) -> int:
        """Rows of a batch that a device takes."""
        data, fsdp, _ = self.mesh
        rows = pretraining(self.config, self.cfg).batch_tokens // self.cfg.sequence_len
        if rows < 1 or rows % (data * fsdp):
            raise UserError(
                f"base: a batch of {rows} rows cannot be shared by {data * fsdp} devices; set base.batch_tokens to a "
                f"multiple of {data * fsdp * self.cfg.sequence_len}"
            )
        return rows // (data * fsdp)

    @property
    def sizes(self) -> list[int]:
        """Micro-batches that the stage may take, the largest first."""
        return memory.micro_batches(self.per_device, self.config.base.micro_batch)


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
    return next((m for m in found if m.total <= job.limit), replace(found[-1], rows=0))


class Compiled:
    """The stage's own step, compiled. UserError where the libraries of a GPU that is not here are not installed."""

    def __init__(self, job: Job):
        config, base = job.config, job.config.base
        self.job, self._programs = job, {}
        found = targets.devices(job.gpu, job.count) if job.gpu else jax.devices()
        self.mesh = sharding.make_mesh(config.mesh, found)
        name = "bfloat16" if job.gpu and config.dtype == "auto" else config.dtype
        self.dtype, plan = devices.training_dtype(name), pretraining(config, job.cfg)
        schedules = optim.make_schedules(base.optim, plan.steps, plan.weight_decay, config.model.arch)
        self.optimizer = optim.make_optimizer(
            job.cfg, base.optim, schedules, plan.batch_tokens, orth_dtype=self.dtype, mesh=self.mesh
        )
        self.step = loop.make_step(graph_of(job.cfg, self.dtype, base.fp8), self.optimizer, self.dtype, self.mesh)
        self.state = sharding.abstract(jax.eval_shape(self._fresh), self.mesh)
        self._split = sharding.rows(self.mesh, leading=1)

    def _fresh(self) -> loop.TrainState:
        return loop.init_state(self.job.cfg, self.optimizer, self.job.config.seed, self.mesh)

    def _shape(self, rows: int) -> tuple[int, int, int]:
        return self.job.per_device // rows, rows * sharding.data_parallel(self.mesh), self.job.cfg.sequence_len

    def program(self, rows: int) -> jax.stages.Compiled:
        """The step with `rows` at a time on a device."""
        if rows not in self._programs:
            array = jax.ShapeDtypeStruct(self._shape(rows), np.int32, sharding=self._split)
            with targets.tracing(self.job.gpu) if self.job.gpu else contextlib.nullcontext():
                self._programs[rows] = self.step.lower(self.state, {"tokens": array, "targets": array}).compile()
        return self._programs[rows]

    def memory(self) -> Memory:
        """With the largest micro-batch that fits, as the run will choose it."""
        sizes, rows = self.job.sizes, 0

        def needed(size: int) -> int:
            return memory.needed_bytes(self.program(size))

        with contextlib.suppress(UserError):
            rows = memory.largest_that_fits(sizes, needed, self.job.limit, "base")
        size = rows or sizes[-1]
        params, moments = _bytes(self.state.params), _bytes(self.state.opt_state)
        cast = 0 if self.dtype.itemsize == 4 else params / 2
        gradients = params * (2 if self.job.per_device > size else 1)  # of a micro-batch, and their sum
        rest = needed(size) - params - cast - moments - gradients
        return Memory(params + cast, moments, gradients, rest, rows, "by the compiled step")

    def seconds(self, rows: int, least: float = 5.0) -> float:
        """The median of the steps that `least` seconds have room for, three at least, on batches of one token id; one
        more before them is not counted."""
        state, program, took = self._fresh(), self.program(rows), []
        batch = jax.device_put(np.zeros(self._shape(rows), np.int32), self._split)
        while len(took) < 4 or sum(took) < least:
            began = time.perf_counter()
            state, metrics = program(state, {"tokens": batch, "targets": batch})
            jax.block_until_ready((state, metrics))
            took.append(time.perf_counter() - began)
        return statistics.median(took[1:])


def _bytes(tree) -> int:
    """Of abstract arrays, on one device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))

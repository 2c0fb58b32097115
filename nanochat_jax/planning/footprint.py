"""The memory that a step of the base stage needs of a device, from the compiled step or by a formula fitted to it."""

import contextlib
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from nanochat_jax import devices
from nanochat_jax.config import GPTConfig, RunConfig
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model import remat, scaling
from nanochat_jax.planning import collectives, targets
from nanochat_jax.planning.program import Program
from nanochat_jax.planning.step import TrainStep, base_plan, sharded_bytes
from nanochat_jax.training import memory


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, with `rows` at a time; rows is 0 where not even one fits. remat: what is kept for them."""

    parameters: float  # float32 masters, and what is cast of them for the products
    optimizer: float
    gradients: float
    activations: float  # and all else that is temporary
    rows: int
    source: str
    remat: str = "none"

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.gradients + self.activations


def state_bytes(cfg: GPTConfig, light: bool = False) -> int:
    """Parameters in float32 and moments: AdamW has two of tables, head and scalars, Muon one of matrices; light: one
    each, in 16 bits, beside what is kept by row and column."""
    counts = scaling.param_counts(cfg)
    if light:
        return 6 * counts["total"]
    return 4 * (3 * counts["total"] - counts["transformer_matrices"])


@dataclass(frozen=True)
class Machine:
    """What is planned for. gpu: a key of targets.GPUS, None for the devices here; price: $ an hour of all, or NaN."""

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


class Job:
    """The base stage of a configuration on a machine. UserError where its devices cannot share the rows of a batch.

    base: tokens, batch and steps; mesh: devices along data, fsdp and tensor; per_device: rows of a batch on a device;
    sizes: of micro-batches, the largest first.
    """

    def __init__(self, config: RunConfig, on: Machine):
        self.config, self.on, self.light = config, on, config.optimizer_state == "light"
        self.cfg, self.base = base_plan(config)
        mesh = sharding.make_mesh(config.mesh, np.arange(on.count))
        self.mesh = tuple(mesh.shape.values())
        self.per_device = memory.rows_per_device("base", self.base.batch_tokens, self.cfg.sequence_len, mesh)
        self.sizes = memory.micro_batches(self.per_device, config.base.micro_batch)


# bytes of activations for a value of the residual stream, in each layer and once, by what is kept of a layer
EACH_LAYER, ONCE = {"none": 24.5, "block": 13.3, "full": 3.3}, {"none": 170.0, "block": 33.0, "full": 33.0}
OF_HEAD = 16  # bytes for a value of the head, beside the activations of a step that keeps less


def estimate(job: Job, rows: int, level: str = "none") -> Memory:
    """By formula; for bfloat16 on GPUs, whose attention keeps no scores.

    Fitted to the steps that targets.py compiles for an H100, d12 to d26 and the classic d20, on one device: within 5 %
    with 4 rows and more, up to 12 % too much with one, where activations and gradients share what they need; on eight
    devices up to 30 % too much, where one micro-batch is a step. With remat fitted to those of an rtx4090 and an a100,
    d20 to d26, within 2 %.
    """
    data, fsdp, tensor = job.mesh
    counts = scaling.param_counts(job.cfg)
    whole = counts["total"] / tensor  # values of the parameters that a device sees once they are gathered
    values = rows * job.cfg.sequence_len * job.cfg.n_embd / tensor
    all_kept = level == "none"  # else the gradients of a micro-batch are added while activations are few
    head = 0 if all_kept else OF_HEAD * job.cfg.padded_vocab * job.cfg.n_embd / tensor
    return Memory(
        parameters=4 * whole / (data * fsdp) + 2 * whole,
        optimizer=(state_bytes(job.cfg, job.light) - 4 * counts["total"]) / (data * fsdp * tensor),
        gradients=(8 if all_kept and job.per_device > rows else 4) * whole,  # of a micro-batch, and their sum
        activations=values * (EACH_LAYER[level] * job.cfg.n_layer + ONCE[level]) + head,
        rows=rows,
        source="by formula",
        remat=level,
    )


def estimated(job: Job) -> Memory:
    """As the run will choose, by the formula."""

    def needed(level: str, rows: int) -> int:
        return int(estimate(job, rows, level).total)

    level, rows, fits = chosen(job, needed)
    return estimate(job, rows, level) if fits else replace(estimate(job, rows, level), rows=0)


def chosen(job: Job, needed: Callable[[str, int], int]) -> tuple[str, int, bool]:
    """What a run will keep of a layer, and its rows at a time; where not even one fits, one with the least kept, and
    False."""
    levels = remat.levels(job.config.remat)
    with contextlib.suppress(UserError):
        return *memory.cheapest_that_fits(levels, job.sizes, needed, job.on.limit, "base"), True
    return levels[-1], job.sizes[-1], False


class Compiled(TrainStep):
    """The stage's own step, compiled. UserError where the libraries of a GPU that is not here are not installed."""

    def __init__(self, job: Job):
        gpu = job.on.gpu
        devices = targets.devices(gpu, job.on.count) if gpu else jax.devices()
        super().__init__(job.config, sharding.make_mesh(job.config.mesh, devices), gpu)
        self.job = job
        self.program = functools.cache(lambda rows, level: self.compile(rows, job.per_device // rows, level))

    def memory(self) -> Memory:
        """As the run will choose."""

        def needed(level: str, size: int) -> int:
            return memory.needed_bytes(self.program(size, level))

        level, size, fits = chosen(self.job, needed)
        params, moments = sharded_bytes(self.state.params), sharded_bytes(self.state.opt_state)
        cast = 0 if self.dtype.itemsize == 4 else params / 2
        gradients = params * (2 if self.job.per_device > size else 1)  # of a micro-batch, and their sum
        rest = needed(level, size) - params - cast - moments - gradients
        return Memory(params + cast, moments, gradients, rest, size if fits else 0, "by the compiled step", level)

    def waits(self, rows: int, level: str) -> float:
        """Seconds of a step that the kernels of GPUs that are not here wait for links."""
        gpu, text = self.job.on.gpu or "", self.program(rows, level).as_text() or ""
        links = collectives.Links.of(gpu, self.job.on.count)
        return collectives.exposed(collectives.play(Program(text), gpu, links)[1])

    def seconds(self, rows: int, level: str, least: float = 5.0) -> float:
        """The median time of a step, over `least` seconds and at least three steps, after one that is not counted."""
        took: list[float] = []
        times = self.times(self.program(rows, level), rows, self.job.per_device // rows)
        while len(took) < 4 or sum(took) < least:
            took.append(next(times))
        return statistics.median(took[1:])

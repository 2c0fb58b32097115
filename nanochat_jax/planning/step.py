"""The train step of the base stage, for what plans its memory, reads its program or measures it."""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np

from nanochat_jax import devices
from nanochat_jax.config import BaseConfig, GPTConfig, ModelConfig, RunConfig, TokenizerConfig
from nanochat_jax.mesh import sharding
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.model.loss import sampler
from nanochat_jax.planning import targets
from nanochat_jax.training import loop, optim


def recipe(depth: int, seq: int, vocab: int, pattern: str = "SSSL", precision: str = "auto", **base) -> RunConfig:
    """The settings of the recipe at one shape; precision: auto, float32, bfloat16 or fp8; `base`: more of its stage."""
    return RunConfig(
        seed=0,
        dtype="bfloat16" if precision == "fp8" else precision,
        model=ModelConfig(depth=depth, sequence_len=seq, window_pattern=pattern),
        tokenizer=TokenizerConfig(vocab),
        base=BaseConfig(fp8=precision == "fp8", **base),
    )


def base_plan(config: RunConfig) -> tuple[GPTConfig, scaling.Plan]:
    """The architecture of a run, and the tokens, batch and steps of its base stage."""
    cfg = scaling.gpt_config(config.model, config.tokenizer.vocab_size)
    return cfg, scaling.base_plan(cfg, config)


def sharded_bytes(tree) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


class TrainStep:
    """The step of a configuration on a mesh. gpu: a key of targets.GPUS, where the mesh is of devices that are not
    here; steps: of the schedules, the plan's where None."""

    def __init__(self, config: RunConfig, mesh, gpu: str | None = None, steps: int | None = None):
        self.config, self.mesh, self._gpu, rates = config, mesh, gpu, config.base.optim
        self.cfg, self.plan = base_plan(config)
        self.dtype = devices.training_dtype("bfloat16" if gpu and config.dtype == "auto" else config.dtype)
        steps = steps or self.plan.steps
        self.schedules = optim.make_schedules(rates, steps, self.plan.weight_decay, config.model.arch)
        batch = self.plan.batch_tokens
        light = config.optimizer_state == "light"
        self._optimizer = optim.make_optimizer(self.cfg, rates, self.schedules, batch, self.dtype, mesh, light)

    def jitted(self, level: str = "none") -> Any:
        """level: of `remat`."""
        graph = graph_of(self.cfg, self.dtype, self.config.base.fp8, level)
        draw = sampler(self.cfg.vocab_size, self.config.base.vocab_sample)
        return loop.make_step(graph, self._optimizer, self.dtype, self.mesh, draw=draw)

    def init(self, params=None) -> loop.TrainState:
        return loop.init_state(self.cfg, self._optimizer, self.config.seed, self.mesh, params)

    @cached_property
    def state(self):
        return sharding.abstract(jax.eval_shape(self.init), self.mesh)

    def tokens(self, rows: int, accumulation: int) -> jax.ShapeDtypeStruct:
        """The ids of a batch, (accumulation, rows of all devices, T), with `rows` on each data-parallel device."""
        shape = (accumulation, rows * sharding.data_parallel(self.mesh), self.cfg.sequence_len)
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.rows(self.mesh, leading=1))

    def compile(self, rows: int, accumulation: int, level: str = "none") -> jax.stages.Compiled:
        """For micro-batches of `rows` on each data-parallel device."""
        array = self.tokens(rows, accumulation)
        with targets.tracing(self._gpu) if self._gpu else contextlib.nullcontext():
            return self.jitted(level).lower(self.state, {"tokens": array, "targets": array}).compile()

    def times(self, compiled: jax.stages.Compiled, rows: int, accumulation: int) -> Iterator[float]:
        """The seconds of step after step from a fresh state, on batches of one token id."""
        state, array = self.init(), self.tokens(rows, accumulation)
        batch = jax.device_put(np.zeros(array.shape, array.dtype), array.sharding)
        while True:
            began = time.perf_counter()
            state, metrics = compiled(state, {"tokens": batch, "targets": batch})
            jax.block_until_ready((state, metrics))
            yield time.perf_counter() - began

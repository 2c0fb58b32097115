"""The recipe's train step at one shape, for what measures it, reads its program or plans its memory."""

from __future__ import annotations

import argparse
import contextlib
from functools import cached_property
from typing import Any

import jax
import numpy as np

from nanochat_jax import devices
from nanochat_jax.bench import frame
from nanochat_jax.config import ModelConfig, OptimConfig
from nanochat_jax.mesh import sharding
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.planning import targets
from nanochat_jax.training import loop, optim

STEPS = 1000  # of the schedules; what a step costs does not depend on it


class RecipeStep:
    """A train step with the recipe's optimizer on a mesh; `kind` names a GPU of `targets` that is not here.

    precision: of the matrix products, one of frame.PRECISIONS. batch_tokens (None: the recipe's), steps and lr_scale
    are for rates and schedules, where losses count.
    """

    def __init__(
        self,
        depth: int,
        mesh,
        *,
        seq: int,
        vocab: int = 32768,
        pattern: str = "SSSL",
        precision: str = "auto",
        kind: str | None = None,
        batch_tokens: int | None = None,
        steps: int = STEPS,
        lr_scale: float = 1.0,
    ):
        self.mesh, self.kind, self.eight_bits = mesh, kind, precision == "fp8"
        self.dtype = devices.training_dtype("bfloat16" if self.eight_bits else precision)
        self.cfg = scaling.gpt_config(ModelConfig(depth=depth, sequence_len=seq, window_pattern=pattern), vocab)
        self.plan = scaling.plan(self.cfg, ratio=12.0, batch_tokens=batch_tokens)
        rates, batch = OptimConfig(lr_scale=lr_scale), self.plan.batch_tokens
        self.schedules = optim.make_schedules(rates, steps, self.plan.weight_decay, "modern")
        self.optimizer = optim.make_optimizer(self.cfg, rates, self.schedules, batch, self.dtype, mesh)
        self.jitted: Any = loop.make_step(
            graph_of(self.cfg, self.dtype, self.eight_bits), self.optimizer, self.dtype, mesh
        )

    @classmethod
    def of(cls, args: argparse.Namespace, mesh, **more) -> RecipeStep:
        """The step that the options of `frame.add_shape` describe."""
        return cls(args.depth, mesh, **{**frame.shown(args, ("seq", "vocab", "pattern", "precision")), **more})

    def init(self, params=None) -> loop.TrainState:
        return loop.init_state(self.cfg, self.optimizer, 0, self.mesh, params)

    @cached_property
    def abstract_state(self):
        return sharding.abstract(jax.eval_shape(self.init), self.mesh)

    @property
    def split(self):
        """How a batch (accumulation, rows, T) lies on the mesh."""
        return sharding.rows(self.mesh, leading=1)

    def lower(self, rows: int, accumulation: int) -> jax.stages.Lowered:
        """`rows` of a micro-batch on each data-parallel device."""
        shape = (accumulation, rows * sharding.data_parallel(self.mesh), self.cfg.sequence_len)
        array = jax.ShapeDtypeStruct(shape, np.int32, sharding=self.split)
        with targets.tracing(self.kind) if self.kind else contextlib.nullcontext():
            return self.jitted.lower(self.abstract_state, {"tokens": array, "targets": array})

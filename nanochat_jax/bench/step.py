"""The recipe's train step at one shape, for what measures it, reads its program or plans its memory."""

from __future__ import annotations

import argparse
import contextlib
from functools import cached_property

import jax
import numpy as np

from nanochat_jax import devices
from nanochat_jax.config import ModelConfig, OptimConfig
from nanochat_jax.mesh import sharding
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.planning import targets
from nanochat_jax.training import loop, optim

PRECISIONS = ("auto", "float32", "bfloat16", "fp8")
STEPS = 1000  # of the schedules; what a step costs does not depend on it


def add_shape(
    parser: argparse.ArgumentParser, *, depth: int, rows: int, seq: int, precision: str = "auto", several=False
) -> None:
    """The options that say what a step is; the arguments are their defaults. several: precisions after commas."""
    parser.add_argument("--depth", type=int, default=depth)
    parser.add_argument("--rows", type=int, default=rows, help="of a micro-batch")
    parser.add_argument("--seq", type=int, default=seq, help="tokens of a row")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--pattern", default="SSSL", help="of the layers' windows: S a quarter of a row, L all of it")
    choices = None if several else PRECISIONS
    parser.add_argument("--precision", choices=choices, default=precision, help="of the products; fp8 beside bfloat16")


class RecipeStep:
    """A train step with the recipe's optimizer on a mesh; `kind` names a GPU of `targets` that is not here.

    precision: of the matrix products, one of PRECISIONS. batch_tokens (None: the recipe's), steps and lr_scale are for
    rates and schedules, where losses count.
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
        self.jitted = loop.make_step(graph_of(self.cfg, self.dtype, self.eight_bits), self.optimizer, self.dtype, mesh)

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


def recipe_accumulation(depth: int, rows: int, seq: int, vocab: int) -> int:
    """Micro-batches of the recipe's batch on one device."""
    cfg = scaling.gpt_config(ModelConfig(depth=depth, sequence_len=seq), vocab)
    return max(1, scaling.plan(cfg, ratio=12.0).batch_tokens // (rows * seq))

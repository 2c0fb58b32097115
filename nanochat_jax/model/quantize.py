"""Weights as int8 with one scale per output: half the bytes of bfloat16 to read for every token.

Symmetric rounding to the nearest of 255 levels (LLM.int8()'s vector-wise absmax, arXiv 2208.07339, for weights alone).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nanochat_jax.model.gpt import merge


class Int8(NamedTuple):
    """A matrix (out, in): values in -127..127, float32 scale (out, 1)."""

    values: jax.Array
    scale: jax.Array


def quantize(params: dict) -> dict:
    """The nested dict with `Int8` in place of the blocks' matrices and the head. Tables are read by row, and gates are
    small: they stay."""

    def one(path, p):
        if p.ndim != 2 or min(p.shape) < 32 or str(getattr(path[0], "key", path[0])) not in ("blocks", "lm_head"):
            return p
        scale = jnp.maximum(jnp.abs(p).max(axis=1, keepdims=True), 1e-12).astype(jnp.float32) / 127.0
        return Int8(jnp.round(p.astype(jnp.float32) / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(one, params)


def dequantize(params: dict, dtype) -> dict:
    """The nested dict with `Int8` as matrices in `dtype` again."""

    def one(p):
        return (p.values.astype(dtype) * p.scale.astype(dtype)) if isinstance(p, Int8) else p

    return jax.tree.map(one, params, is_leaf=lambda p: isinstance(p, Int8))


def rounded(model):
    """The GPT with its weights rounded to int8 and back, to measure what the rounding costs."""
    graph, state = nnx.split(model)
    params = jax.jit(lambda p: dequantize(quantize(p), jnp.float32))(nnx.to_pure_dict(state))
    return merge(graph, params)

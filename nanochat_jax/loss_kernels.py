"""The elementwise part of the softcapped cross-entropy on a GPU, in one pass over a chunk's logits.

XLA makes of it a kernel for tanh and one for the rest, which exchange float32; from one Pallas kernel, which Triton
compiles, comes nothing but what the products read. `loss.py` has the formulas, and the plain path of a CPU or TPU.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 1024  # entries of the vocabulary: a warp's row, 32 a thread
TILE = 4096  # entries of a program: 8 KB to read and as many to write in bfloat16, with 4 warps


def _tile(tokens: int, size: int) -> tuple[int, int]:
    """(rows, entries) of a program's tile, powers of two that divide the logits' shape."""
    block = math.gcd(size, BLOCK)
    return math.gcd(tokens, TILE // block), block


def _terms(z, targets, first, vocab, softcap):
    """(u, e) of a tile of logits whose columns begin at `first`, float32.

    With q = 1 / (1 + exp(2 z / c)), tanh(z / c) = 1 - 2 q and 1 - tanh^2 = 4 q (1 - q), where nothing cancels.
    """
    log2e = math.log2(math.e)
    q = 1.0 / (1.0 + jnp.exp2(z.astype(jnp.float32) * (2 * log2e / softcap)))
    ids = first + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    e = jnp.where((ids != targets[:, None]) & (ids < vocab), jnp.exp2(softcap * log2e * (1.0 - 2.0 * q)), 0.0)
    return e * (4.0 * q * (1.0 - q)), e


def softcap_terms(z_ref, y_ref, u_ref, sum_ref, *, vocab, softcap):
    u, e = _terms(z_ref[...], y_ref[...], pl.program_id(1) * z_ref.shape[1], vocab, softcap)
    u_ref[...] = u.astype(u_ref.dtype)
    sum_ref[...] = e.sum(axis=1)


def terms(z, targets, vocab: int, softcap: float, *, interpret=False):
    """u = (1 - t^2) e in z's dtype, (C, V), and the sums of e, (C,) float32, without the target and the padding.

    z (C, V) bfloat16 or float32, the logits before the cap; u takes their place in memory. targets (C,) int32.
    """
    rows, block = _tile(*z.shape)
    grid = z.shape[0] // rows, z.shape[1] // block
    tile, row = pl.BlockSpec((rows, block), lambda i, j: (i, j)), pl.BlockSpec((rows,), lambda i, j: (i,))
    u, sums = pl.pallas_call(
        functools.partial(softcap_terms, vocab=vocab, softcap=softcap),
        grid=grid,
        in_specs=[tile, row],
        out_specs=[tile, pl.BlockSpec((None, rows), lambda i, j: (j, i))],
        out_shape=[jax.ShapeDtypeStruct(z.shape, z.dtype), jax.ShapeDtypeStruct((grid[1], z.shape[0]), jnp.float32)],
        input_output_aliases={0: 0},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(z, targets)
    return u, sums.sum(axis=0)

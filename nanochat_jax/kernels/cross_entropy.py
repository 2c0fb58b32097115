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
BOTH = (128, 64)  # rows and entries of a tile that is written in both layouts: 57 registers a thread with 8 warps


def _tile(tokens: int, size: int) -> tuple[int, int]:
    """(rows, entries) of a program's tile, powers of two that divide the logits' shape."""
    block = math.gcd(size, BLOCK)
    return math.gcd(tokens, TILE // block), block


def _terms(z, targets, first, size, vocab, softcap):
    """(u, 4 e) of a tile of logits whose columns begin at `first` of all `size` ones, float32.

    With q = 1 / (1 + exp(2 z / c)), tanh(z / c) = 1 - 2 q and 1 - tanh^2 = 4 (q - q^2), of which no digit is lost where
    q is small and e large. The 4 is in the exponent: an element's instructions take about as long as its bytes.
    """
    log2e = math.log2(math.e)
    q = 1.0 / (1.0 + jnp.exp2(z.astype(jnp.float32) * (2 * log2e / softcap)))
    ids = first + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    others = ids != targets[:, None]
    others = others & (ids < vocab) if vocab < size else others
    e = jnp.where(others, jnp.exp2((softcap * log2e + 2) - (2 * softcap * log2e) * q), 0.0)
    return e * (q - q * q), e


def softcap_terms(z_ref, y_ref, u_ref, sum_ref, *, size, vocab, softcap):
    u, e = _terms(z_ref[...], y_ref[...], pl.program_id(1) * z_ref.shape[1], size, vocab, softcap)
    u_ref[...] = u.astype(u_ref.dtype)
    sum_ref[...] = 0.25 * e.sum(axis=1)


def softcap_sums(z_ref, y_ref, sum_ref, most_ref, *, size, vocab, softcap):
    u, e = _terms(z_ref[...], y_ref[...], pl.program_id(1) * z_ref.shape[1], size, vocab, softcap)
    sum_ref[...] = 0.25 * e.sum(axis=1)
    most_ref[...] = u.max(axis=1)


def softcap_rounded(z_ref, y_ref, f_ref, g_ref, turned_ref, *, size, vocab, softcap):
    u, _ = _terms(z_ref[...], y_ref[...], pl.program_id(1) * z_ref.shape[1], size, vocab, softcap)
    g = (u * f_ref[...][:, None]).astype(g_ref.dtype)
    g_ref[...] = g
    turned_ref[...] = g.T


def _call(kernel, tile, args, outs, vocab, softcap, interpret, warps=4, **more):
    """kernel over tiles of args[0], the logits; the other arguments have one element a row.

    outs: of each result (block, index map, shape, dtype).
    """
    (rows, block), z = tile, args[0]
    row = pl.BlockSpec((rows,), lambda i, j: (i,))
    return pl.pallas_call(
        functools.partial(kernel, size=z.shape[1], vocab=vocab, softcap=softcap),
        grid=(z.shape[0] // rows, z.shape[1] // block),
        in_specs=[pl.BlockSpec(tile, lambda i, j: (i, j)), *(row for _ in args[1:])],
        out_specs=[pl.BlockSpec(block, index) for block, index, _, _ in outs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, _, shape, dtype in outs],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        **more,
    )(*args)


def _per_tile(z, tile):
    """A float32 result of one element a row and tile, (V / block, C): rows beside each other are written at once."""
    rows, block = tile
    return (None, rows), lambda i, j: (j, i), (z.shape[1] // block, z.shape[0]), jnp.float32


def terms(z, targets, vocab: int, softcap: float, *, interpret=False):
    """u = (1 - t^2) e in z's dtype, (C, V), and the sums of e, (C,) float32, without the target and the padding.

    z (C, V) bfloat16 or float32, the logits before the cap; u takes their place in memory. targets (C,) int32.
    """
    tile = _tile(*z.shape)
    outs = [(tile, lambda i, j: (i, j), z.shape, z.dtype), _per_tile(z, tile)]
    aliases = {"input_output_aliases": {0: 0}}
    u, sums = _call(softcap_terms, tile, (z, targets), outs, vocab, softcap, interpret, **aliases)
    return u, sums.sum(axis=0)


def sums(z, targets, vocab: int, softcap: float, *, interpret=False):
    """The sums of e and the largest u of every row, (C,) float32 each: `terms` that writes no u."""
    tile = _tile(*z.shape)
    outs = [_per_tile(z, tile), _per_tile(z, tile)]
    found, most = _call(softcap_sums, tile, (z, targets), outs, vocab, softcap, interpret)
    return found.sum(axis=0), most.max(axis=0)


def rounded(z, targets, factors, vocab: int, softcap: float, dtype, *, interpret=False):
    """u times the rows' factors, (C,) float32, in an 8-bit `dtype`, and the same transposed: (C, V) and (V, C).

    The factors take the largest element to the largest number of `dtype`, or so little above that it rounds to it.
    8-bit products want what they sum over to be the last axis, which is V in one of the two and C in the other. u is
    made of z anew, as z is no larger than u and so nothing has to be written before the rows' sums are known.
    """
    (C, V), tile = z.shape, tuple(map(math.gcd, z.shape, BOTH))
    outs = [(tile, lambda i, j: (i, j), (C, V), dtype), (tile[::-1], lambda i, j: (j, i), (V, C), dtype)]
    return _call(softcap_rounded, tile, (z, targets, factors), outs, vocab, softcap, interpret, warps=8)

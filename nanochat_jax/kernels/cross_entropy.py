"""The elementwise part of the softcapped cross-entropy on a GPU, in one pass over a chunk's logits.

XLA makes two kernels of it, for tanh and for the rest, which exchange float32; one Pallas kernel writes only what the
products read. `model/loss.py` has the formulas, and the plain path of a CPU or TPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nanochat_jax.kernels.launch import launch

BLOCK = 1024  # columns of a tile: a warp's row, 32 a thread
TILE = 4096  # elements of a tile: 8 KB to read and as many to write in bfloat16, with 4 warps
BOTH = (128, 64)  # rows and columns of a tile that is written in both layouts: 57 registers a thread with 8 warps


def _tile(tokens: int, size: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two that divide the logits' shape."""
    block = math.gcd(size, BLOCK)
    return math.gcd(tokens, TILE // block), block


def _terms(z_ref, y_ref, padded, vocab, softcap):
    """(u, 4 e) of a tile of logits, float32, of a row of `padded` columns, of which the first `vocab` are entries.

    With q = 1 / (1 + exp(2 z / c)), tanh(z / c) = 1 - 2 q and 1 - tanh^2 = 4 (q - q^2), of which no digit is lost where
    q is small and e large. The 4 is in the exponent: an element's instructions take about as long as its bytes.
    """
    z, targets, first = z_ref[...], y_ref[...], pl.program_id(1) * z_ref.shape[1]
    log2e = math.log2(math.e)
    q = 1.0 / (1.0 + jnp.exp2(z.astype(jnp.float32) * (2 * log2e / softcap)))
    ids = first + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    others = ids != targets[:, None]
    others = others & (ids < vocab) if vocab < padded else others
    e = jnp.where(others, jnp.exp2((softcap * log2e + 2) - (2 * softcap * log2e) * q), 0.0)
    return e * (q - q * q), e


def softcap_terms(z_ref, y_ref, u_ref, sum_ref, **shape):
    u, e = _terms(z_ref, y_ref, **shape)
    u_ref[...] = u.astype(u_ref.dtype)
    sum_ref[...] = 0.25 * e.sum(axis=1)


def softcap_sums(z_ref, y_ref, sum_ref, most_ref, **shape):
    u, e = _terms(z_ref, y_ref, **shape)
    sum_ref[...] = 0.25 * e.sum(axis=1)
    most_ref[...] = u.max(axis=1)


def softcap_rounded(z_ref, y_ref, f_ref, g_ref, transposed_ref, **shape):
    u, _ = _terms(z_ref, y_ref, **shape)
    g = (u * f_ref[...][:, None]).astype(g_ref.dtype)
    g_ref[...] = g
    transposed_ref[...] = g.T


def _call(kernel, tile, args, outputs, vocab, softcap, warps=4, **more):
    """The kernel over tiles of args[0], the logits; the other arguments have one element a row."""
    (rows, block), z = tile, args[0]
    row = pl.BlockSpec((rows,), lambda i, j: (i,))
    return launch(
        functools.partial(kernel, padded=z.shape[1], vocab=vocab, softcap=softcap),
        (z.shape[0] // rows, z.shape[1] // block),
        [(z, pl.BlockSpec(tile, lambda i, j: (i, j))), *((x, row) for x in args[1:])],
        outputs,
        warps=warps,
        **more,
    )


def _per_tile(z, tile):
    """A float32 output of one element a row and tile, (V / block, C): rows beside each other are written at once."""
    rows, block = tile
    return pl.BlockSpec((None, rows), lambda i, j: (j, i)), (z.shape[1] // block, z.shape[0]), jnp.float32


def terms(z, targets, vocab: int, softcap: float):
    """u = (1 - t^2) e in z's dtype, (C, V), and the sums of e, (C,) float32, without the target and the padding.

    z (C, V) bfloat16 or float32, the logits before the cap; u takes their place in memory. targets (C,) int32.
    """
    tile = _tile(*z.shape)
    outputs = [(pl.BlockSpec(tile, lambda i, j: (i, j)), z.shape, z.dtype), _per_tile(z, tile)]
    u, sums = _call(softcap_terms, tile, (z, targets), outputs, vocab, softcap, input_output_aliases={0: 0})
    return u, sums.sum(axis=0)


def sums(z, targets, vocab: int, softcap: float):
    """The sums of e and the largest u of every row, (C,) float32 each: `terms` that writes no u."""
    tile = _tile(*z.shape)
    found, most = _call(softcap_sums, tile, (z, targets), [_per_tile(z, tile)] * 2, vocab, softcap)
    return found.sum(axis=0), most.max(axis=0)


def rounded(z, targets, factors, vocab: int, softcap: float, dtype):
    """u times the rows' factors, (C,) float32, in an 8-bit `dtype`, and the same transposed: (C, V) and (V, C).

    The factors bring the largest element to the largest number of `dtype`, or so little above that it rounds to it.
    8-bit products sum over the last axis, which must be V for one of the two gradients and C for the other. u is
    computed from z again: z is as large as u, and the rows' sums are not known when u is first computed.
    """
    (C, V), tile = z.shape, tuple(map(math.gcd, z.shape, BOTH))
    straight = pl.BlockSpec(tile, lambda i, j: (i, j)), (C, V), dtype
    transposed = pl.BlockSpec(tile[::-1], lambda i, j: (j, i)), (V, C), dtype
    return _call(softcap_rounded, tile, (z, targets, factors), [straight, transposed], vocab, softcap, warps=8)

"""Flash attention for GPUs, causal and with a left window; its loops skip the tiles that the mask hides.

Dao, FlashAttention-2 (arXiv 2307.08691), as three Pallas kernels that Triton compiles: the output with its log-sum-exp,
dq, and dk with dv. Every program of a kernel holds one tile of rows and loops over the tiles of the other side that
some of its rows see: first those at the window's edge, then the whole ones, without a mask, then those on the diagonal.
So a window of 512 at T = 2048 saves as much in the backward pass as in the forward one.

Scores are kept in base 2, exp(x) = exp2(x log2(e)); products take the inputs' type and add up in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from nanochat_jax.kernels.launch import launch

_MASKED = -1e30  # finite: a row that a tile hides whole is wiped out by the next one that it sees


class Tiles(NamedTuple):
    """How a kernel is cut. rows: of a program's own tile; step: of the other side's, both powers of two."""

    rows: int
    step: int
    warps: int
    stages: int  # of the loads that run ahead of the products


class Cut(NamedTuple):
    forward: Tiles
    dq: Tiles
    dkv: Tiles


# head size -> tiles that ptxas gives registers to, on Hopper without spills, and whose loads fit the shared memory of
# Ampere and Ada (99 KB) and of Hopper (131 KB, as its products read from there); not yet compared on a GPU
CUTS = {
    64: Cut(Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2)),
    128: Cut(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
}


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, cut: Cut | None = None) -> jax.Array:
    """Softmax attention of scale 1/sqrt(N): position t sees itself and the `window` positions before it (None: all).

    q (B, T, H, N), k and v (B, T, K, N), H a multiple of K -> (B, T, H, N) in q's dtype. N is one of CUTS, or a power
    of two with a `cut`. A T that the tiles do not divide is padded: no position sees what comes after the last one.
    """
    T, cut = q.shape[1], cut or CUTS[q.shape[-1]]
    pad = -T % math.lcm(*(n for tiles in cut for n in (tiles.rows, tiles.step)))
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) if pad else x for x in (q, k, v))
    return _attention(q, k, v, T + pad if window is None else min(window, T + pad), cut)[:, :T]


def tiles_of_keys(i, T: int, window: int, tiles: Tiles):
    """(first, whole, masked, end) of the tiles of keys that tile i of queries visits: whole <= j < masked need no mask.

    The rest of first <= j < end is cut by the window's edge, or from `masked` on by the diagonal. (lax.div: Triton
    knows no division that rounds down.)
    """
    start, step = i * tiles.rows, tiles.step
    first = lax.div(jnp.maximum(start - window, 0), step)
    end = lax.div(start + tiles.rows + step - 1, step)
    whole = jnp.minimum(lax.div(jnp.maximum(start + tiles.rows - 1 - window, 0) + step - 1, step), end)
    return first, whole, jnp.maximum(lax.div(start + 1, step), whole), end


def tiles_of_queries(j, T: int, window: int, tiles: Tiles):
    """As `tiles_of_keys`, of the tiles of queries that see tile j of keys; here the diagonal cuts the first of them."""
    start, step = j * tiles.rows, tiles.step
    first = lax.div(start, step)
    end = lax.div(jnp.minimum(start + tiles.rows + window, T) + step - 1, step)
    whole = jnp.minimum(lax.div(start + tiles.rows + step - 2, step), end)
    return first, whole, jnp.maximum(jnp.minimum(lax.div(start + window + 1, step), end), whole), end


def _walk(visit: Callable, bounds, carry):
    """visit(j, carry, masked) for every tile, with a mask where one is needed."""
    first, whole, masked, end = bounds
    for lower, upper, mask in ((first, whole, True), (whole, masked, False), (masked, end, True)):
        carry = lax.fori_loop(lower, upper, functools.partial(visit, masked=mask), carry)
    return carry


def _dot(a, b, over=(1, 0)):
    """Product over axis over[0] of a and over[1] of b, in float32."""
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _seen(first_query, first_key, shape, window: int, queries: int = 0):
    """Which pairs of a tile are admitted; axis `queries` of `shape` runs over queries."""
    query = first_query + lax.broadcasted_iota(jnp.int32, shape, queries)
    distance = query - (first_key + lax.broadcasted_iota(jnp.int32, shape, 1 - queries))
    return (distance >= 0) & (distance <= window)


def flash_forward(q_ref, k_ref, v_ref, o_ref, lse_ref, *, T, window, scale, tiles):
    # the last tiles see the most where nothing bounds them to the left: they begin first
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    q = q_ref[pl.ds(i * tiles.rows, tiles.rows)]

    def visit(j, carry, masked):
        acc, top, total = carry
        keys = pl.ds(j * tiles.step, tiles.step)
        s = _dot(q, k_ref[keys], (1, 1)) * scale
        if masked:
            s = jnp.where(_seen(i * tiles.rows, j * tiles.step, s.shape, window), s, _MASKED)
        new_top = jnp.maximum(top, s.max(axis=1))
        p, keep = jnp.exp2(s - new_top[:, None]), jnp.exp2(top - new_top)
        acc = acc * keep[:, None] + _dot(p.astype(v_ref.dtype), v_ref[keys])
        return acc, new_top, total * keep + p.sum(axis=1)

    rows = tiles.rows
    carry = jnp.zeros(q.shape, jnp.float32), jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
    acc, top, total = _walk(visit, tiles_of_keys(i, T, window, tiles), carry)
    o_ref[pl.ds(i * rows, rows)] = (acc / total[:, None]).astype(o_ref.dtype)
    lse_ref[pl.ds(i * rows, rows)] = top + jnp.log2(total)


def flash_dq(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *, T, window, scale, tiles):
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = pl.ds(i * tiles.rows, tiles.rows)
    q, do, lse, delta = q_ref[rows], do_ref[rows], lse_ref[rows], delta_ref[rows]

    def visit(j, dq, masked):
        keys = pl.ds(j * tiles.step, tiles.step)
        k = k_ref[keys]
        p = jnp.exp2(_dot(q, k, (1, 1)) * scale - lse[:, None])
        if masked:
            p = jnp.where(_seen(i * tiles.rows, j * tiles.step, p.shape, window), p, 0.0)
        ds = p * (_dot(do, v_ref[keys], (1, 1)) - delta[:, None])
        return dq + _dot(ds.astype(k.dtype), k)

    dq = _walk(visit, tiles_of_keys(i, T, window, tiles), jnp.zeros(q.shape, jnp.float32))
    dq_ref[rows] = (dq * (scale / math.log2(math.e))).astype(dq_ref.dtype)


def flash_dkv(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, T, window, scale, tiles):
    """Scores stand transposed, (keys, queries), so that no tile has to be turned before a product."""
    j = pl.program_id(0)
    keys = pl.ds(j * tiles.rows, tiles.rows)
    k, v = k_ref[keys], v_ref[keys]

    def of_head(g, carry):
        def visit(i, carry, masked):
            dk, dv = carry
            rows = pl.ds(i * tiles.step, tiles.step)
            q, do = q_ref[rows, g], do_ref[rows, g]
            p = jnp.exp2(_dot(k, q, (1, 1)) * scale - lse_ref[g, rows][None, :])
            if masked:
                p = jnp.where(_seen(i * tiles.step, j * tiles.rows, p.shape, window, queries=1), p, 0.0)
            dv += _dot(p.astype(do.dtype), do)
            ds = p * (_dot(v, do, (1, 1)) - delta_ref[g, rows][None, :])
            return dk + _dot(ds.astype(q.dtype), q), dv

        return _walk(visit, tiles_of_queries(j, T, window, tiles), carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], of_head, (zeros, zeros))
    dk_ref[keys] = (dk * (scale / math.log2(math.e))).astype(dk_ref.dtype)
    dv_ref[keys] = dv.astype(dv_ref.dtype)


def _specs(shape, group: int, of_keys: bool):
    """(queries, keys, rows) of what a program is given: the whole length of its heads, of which it loads what it needs.

    A program has one head of queries; one of keys, and all `group` heads of queries that share it, where of_keys.
    """
    _, T, _, N = shape
    own = pl.BlockSpec((None, T, None, N), lambda i, h, b: (b, 0, h, 0))
    if of_keys:
        all_of_group = pl.BlockSpec((None, T, group, N), lambda i, h, b: (b, 0, h, 0))
        return all_of_group, own, pl.BlockSpec((None, group, T), lambda i, h, b: (b, h, 0))
    shared = pl.BlockSpec((None, T, None, N), lambda i, h, b: (b, 0, lax.div(h, group), 0))
    return own, shared, pl.BlockSpec((None, None, T), lambda i, h, b: (b, h, 0))


def _call(kernel, tiles: Tiles, window: int, heads: int, args, in_specs, outputs):
    """The kernel over (T / rows, heads, B) programs; outputs: (spec, an array that the result is like)."""
    B, T, _, N = args[0].shape
    kernel = functools.partial(kernel, T=T, window=window, scale=math.log2(math.e) / math.sqrt(N), tiles=tiles)
    inputs, outputs = zip(args, in_specs), [(spec, like.shape, like.dtype) for spec, like in outputs]
    with jax.named_scope(f"flash_window_{window}"):  # `bench kernels` reads it in the compiled program
        return launch(kernel, (T // tiles.rows, heads, B), inputs, outputs, warps=tiles.warps, stages=tiles.stages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, window: int, cut: Cut):
    return _forward(q, k, v, window, cut)[0]


def _forward(q, k, v, window, cut):
    B, T, H, _ = q.shape
    own, shared, row = _specs(q.shape, H // k.shape[2], of_keys=False)
    outs = [(own, q), (row, jax.ShapeDtypeStruct((B, H, T), jnp.float32))]
    o, lse = _call(flash_forward, cut.forward, window, H, (q, k, v), [own, shared, shared], outs)
    return o, (q, k, v, o, lse)


def _backward(window, cut, kept, do):
    q, k, v, o, lse = kept
    H, K = q.shape[2], k.shape[2]
    delta = jnp.einsum("bthn,bthn->bht", o, do, preferred_element_type=jnp.float32)
    args = (q, k, v, do, lse, delta)
    own, shared, row = _specs(q.shape, H // K, of_keys=False)
    (dq,) = _call(flash_dq, cut.dq, window, H, args, [own, shared, shared, own, row, row], [(own, q)])
    group, own, row = _specs(q.shape, H // K, of_keys=True)
    dk, dv = _call(flash_dkv, cut.dkv, window, K, args, [group, own, own, group, row, row], [(own, k), (own, v)])
    return dq, dk, dv


_attention.defvjp(_forward, _backward)

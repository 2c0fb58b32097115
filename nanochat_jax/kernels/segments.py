"""Rows added up by their ids: the gradient of a table from which rows were looked up.

XLA adds rows by atomic operations, which wait for each other where an id is frequent. Here positions are sorted by id
once for all tables, and one program adds up the rows of an id in float32 and writes the sum once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanochat_jax.kernels.launch import by_kernels, launch

TOGETHER = 8  # rows that a program reads at once
WIDEST = 512  # columns of a program


@jax.custom_vjp
def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows (..., D) of table (V, D) at ids (...), each within 0..V-1."""
    return table.at[ids].get(mode="clip")


def _look_up_bwd(kept, dy):
    ids, like = kept
    rows, ids = dy.reshape(-1, dy.shape[-1]).astype(like.dtype), ids.reshape(-1)
    if _by_a_kernel(rows):
        return _add_rows(None, rows, ids, None, of=len(like)), None
    return add_rows(jnp.zeros((len(like), rows.shape[1]), like.dtype), rows, ids), None


look_up.defvjp(lambda table, ids: (look_up(table, ids), (ids, jnp.zeros((len(table), 0), table.dtype))), _look_up_bwd)


def add_rows(total: jax.Array, rows: jax.Array, ids: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """total (V, D) with every row of rows (M, D), times its weight (M,), added to the row that its id (M,) names."""
    if _by_a_kernel(rows):
        return _add_rows(total, rows, ids, weights)
    rows = rows.astype(total.dtype) if weights is None else (weights[:, None] * rows).astype(total.dtype)
    return total.at[ids].add(rows, mode="clip")


def _by_a_kernel(rows) -> bool:
    return by_kernels(rows) and len(rows) % TOGETHER == 0


def add_rows_of_an_id(bounds_ref, order_ref, rows_ref, *refs, weighted, begun):
    *given, out_ref = refs  # given: weights, if weighted, and the total so far, if begun
    begin, end = bounds_ref[0], bounds_ref[1]
    columns, lanes = jnp.arange(out_ref.shape[0])[None, :], jnp.arange(TOGETHER)

    def add(step, acc):
        place = begin + step * TOGETHER + lanes
        meant = place < end
        where = triton.load(order_ref.at[jnp.where(meant, place, 0)])
        shape = TOGETHER, len(acc)
        tile = rows_ref.at[jnp.broadcast_to(where[:, None], shape), jnp.broadcast_to(columns, shape)]
        x = triton.load(tile, mask=jnp.broadcast_to(meant[:, None], shape), other=0).astype(jnp.float32)
        if weighted:
            x = x * triton.load(given[0].at[where])[:, None]
        return acc + x.sum(axis=0)

    steps = jax.lax.div(end - begin + TOGETHER - 1, TOGETHER)
    acc = given[-1][...].astype(jnp.float32) if begun else jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = jax.lax.fori_loop(0, steps, add, acc).astype(out_ref.dtype)


def _add_rows(total, rows, ids, weights, of: int = 0):
    """total None: `of` rows of zeros, in the type of `rows`."""
    (M, D), V = rows.shape, of or len(total)
    ids = jnp.clip(ids, 0, V - 1)
    order = jnp.argsort(ids)
    ends = jnp.cumsum(jnp.zeros(V, jnp.int32).at[ids].add(1))
    bounds = jnp.stack([jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends], axis=1)  # (V, 2)
    columns = min(WIDEST, D & -D)  # the largest power of two that divides D
    row = pl.BlockSpec((None, columns), lambda v, c: (v, c))
    whole = pl.BlockSpec((M,), lambda v, c: (0,))
    inputs = [(bounds, pl.BlockSpec((None, 2), lambda v, c: (v, 0))), (order, whole)]
    inputs += [(rows, pl.BlockSpec((M, columns), lambda v, c: (0, c)))]
    inputs += [(x, spec) for x, spec in ((weights, whole), (total, row)) if x is not None]
    return launch(
        functools.partial(add_rows_of_an_id, weighted=weights is not None, begun=total is not None),
        (V, D // columns),
        inputs,
        [(row, (V, D), rows.dtype if total is None else total.dtype)],
        warps=2 if columns <= 256 else 4,
        input_output_aliases={} if total is None else {len(inputs) - 1: 0},
    )[0]

"""Matrix products in the form that is fastest on the device. On a GPU they are all the same; on a CPU they are not.

XLA multiplies bfloat16 on a CPU twice as fast as float32 where the cores can (`devices.cpu_has_bfloat16`), but only
into float32: for a result in bfloat16 it converts both operands first. And it is slow where the first operand must be
transposed, as in a weight's gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp

from nanochat_jax import devices

FEW_ROWS = 64  # as many as a decode step has
TURNED_ROWS = 8  # of results that are cheaper to turn than weights are to repack
RUN = 1024  # tokens that a weight's gradient sums at once in 16 bits, whose rate falls with longer sums


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (..., in) times weight (out, in), transposed: (..., out) in x's dtype."""
    rows = math.prod(x.shape[:-1])
    if devices.platform() != "cpu":
        return einsum("...i,oi->...o", x, weight)
    flat = x.reshape(rows, -1)
    if rows == 1:
        y = jnp.dot(flat, weight.T, preferred_element_type=jnp.float32).astype(x.dtype)
    elif rows <= TURNED_ROWS and x.dtype.itemsize > 2:
        # weight is not repacked, which pays until the result must be turned; the barriers keep XLA from undoing it
        y = jax.lax.optimization_barrier(weight @ jax.lax.optimization_barrier(flat.T)).T
    else:
        y = _of_many(flat, weight)
    return y.reshape(*x.shape[:-1], -1)


def is_one_step(x: jax.Array) -> bool:
    """Whether x (B, T, in) is one token of few rows: a CPU takes as long to call such a product as to make it."""
    return devices.platform() == "cpu" and x.shape[1:-1] == (1,) and len(x) <= FEW_ROWS


def einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum in a's dtype."""
    if devices.platform() != "cpu":
        return jnp.einsum(formula, a, b)
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a (..., m, k) @ b (..., k, n) in a's dtype."""
    return einsum("...mk,...kn->...mn", a, b)


def transposed(result: jax.Array) -> jax.Array:
    """The transpose of a product's result (m, n), after the product. XLA on a CPU may otherwise swap the operands, into
    a form that it lacks for 16 bits, and fail when it runs (jax 0.10)."""
    return (jax.lax.optimization_barrier(result) if devices.platform() == "cpu" else result).T


@jax.custom_vjp
def _of_many(x, weight):
    """(rows, in) and (out, in) to (rows, out), on a CPU."""
    return einsum("ti,oi->to", x, weight)


def _of_many_bwd(kept, dy):
    x, weight = kept
    dx = einsum("to,oi->ti", dy, weight)
    if x.dtype.itemsize > 2:
        return dx, jax.lax.optimization_barrier(dy.T) @ x
    narrow, wide = (x, dy) if x.shape[1] < dy.shape[1] else (dy, x)
    narrow_T = jax.lax.optimization_barrier(narrow.T)
    runs = [slice(start, start + RUN) for start in range(0, len(x), RUN)]
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    total = sum(dot(narrow_T[:, run], wide[run]) for run in runs)
    return dx, (transposed(total) if narrow is x else total).astype(weight.dtype)


_of_many.defvjp(lambda x, weight: (_of_many(x, weight), (x, weight)), _of_many_bwd)

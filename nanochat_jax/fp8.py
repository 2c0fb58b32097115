"""Matrix products in 8-bit floats, with one scale for a whole tensor, taken from its largest element when it is used.

Micikevicius et al., arXiv 2209.05433: e4m3 for activations and weights, e5m2, which reaches further, for gradients.
Of y = x W^T the products of the backward pass, dx = dy W and dW = dy^T x, take what the forward pass has quantised, so
that a byte and not two is kept for every activation. For a GPU the products are written as those of what the bytes
stand for, values times scale, which XLA knows as cuBLASLt's 8-bit product with two scales on an H100 and later; it then
writes both layouts that the three products want, as it quantises. Elsewhere they are emulated, to the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax import devices

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
_TINY = 1e-12  # the least largest element, where all are 0
MULTIPLE, SMALLEST = 16, 128  # both dimensions of a matrix: what the tensor cores want, and what is worth the casts


class Quantized(NamedTuple):
    """values in 8 bits times scale, a float32 scalar that bfloat16 holds as well."""

    values: jax.Array
    scale: jax.Array


def scale_of(largest: jax.Array, dtype) -> jax.Array:
    """The scale by which `largest`, a scalar, takes the largest number of `dtype`."""
    scale = jnp.maximum(largest.astype(jnp.float32), _TINY) / float(jnp.finfo(dtype).max)
    return scale.astype(jnp.bfloat16).astype(jnp.float32)


def quantize(x: jax.Array, dtype=E4M3, largest: jax.Array | None = None) -> Quantized:
    """x (any shape) so that its largest element (`largest`, where known) takes the largest number of `dtype`."""
    most = float(jnp.finfo(dtype).max)
    scale = scale_of(jnp.max(jnp.abs(x)) if largest is None else largest, dtype)
    scaled = x.astype(jnp.float32) / scale
    return Quantized(jnp.clip(scaled, -most, most).astype(dtype), scale)


def dot(a: Quantized, b: Quantized, contract: tuple[int, int], out=jnp.bfloat16) -> jax.Array:
    """The product of two matrices over axes `contract`, accumulated in float32, in dtype `out`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if devices.platform() == "gpu":
        wide = [q.values.astype(jnp.bfloat16) * q.scale.astype(jnp.bfloat16) for q in (a, b)]
        return jax.lax.dot_general(*wide, dims, preferred_element_type=out)
    y = jax.lax.dot_general(a.values, b.values, dims, preferred_element_type=jnp.float32)
    return (y * (a.scale * b.scale)).astype(out)


def worthwhile(weight_shape: tuple[int, ...]) -> bool:
    """Whether a matrix is large and even enough; gates and the like stay in 16 bits."""
    return all(n % MULTIPLE == 0 and n >= SMALLEST for n in weight_shape)


@jax.custom_vjp
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (..., in) times weight (out, in), transposed: (..., out) in x's dtype, by 8-bit products in both directions."""
    return _forward(x, weight)[0]


def _forward(x, weight):
    x8, w8 = quantize(x.reshape(-1, x.shape[-1])), quantize(weight)
    y = dot(x8, w8, (1, 1), x.dtype).reshape(*x.shape[:-1], -1)
    return y, (x8, w8, jnp.zeros((0,), x.dtype), jnp.zeros((0,), weight.dtype))  # the latter for their dtypes alone


def _backward(kept, dy):
    x8, w8, like_x, like_w = kept
    dy8 = quantize(dy.reshape(-1, dy.shape[-1]), E5M2)
    dx = dot(dy8, w8, (1, 0), like_x.dtype).reshape(*dy.shape[:-1], -1)
    return dx, dot(dy8, x8, (0, 0), like_w.dtype)


product.defvjp(_forward, _backward)

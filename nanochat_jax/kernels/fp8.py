"""Matrix products in 8-bit floats, with one scale for a whole tensor, taken from its largest element when it is used.

Micikevicius et al., arXiv 2209.05433: e4m3 for activations and weights, e5m2, which reaches further, for gradients.
Of y = x W^T the products of the backward pass, dx = dy W and dW = dy^T x, take what the forward pass has quantised, so
that a byte and not two is kept for every activation. An H100's 8-bit products sum over the last axis of both operands:
the three need every array in both layouts, which one kernel writes as it quantises.

For a GPU a product is written as that of what the bytes stand for, values times scale, which XLA knows as cuBLASLt's
8-bit product with two scales on an H100 and later. Elsewhere products are emulated, to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanochat_jax import devices
from nanochat_jax.kernels.fused import by_kernels

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
_TINY = 1e-12  # the least largest element, where all are 0
MULTIPLE, SMALLEST = 16, 128  # both dimensions of a matrix: what the tensor cores want, and what is worth the casts
TILE = (128, 64)  # of a program that writes both layouts


class Quantized(NamedTuple):
    """values in 8 bits times scale, a float32 scalar that bfloat16 holds as well."""

    values: jax.Array
    scale: jax.Array
    other: jax.Array | None = None  # a matrix's values transposed, where they were written as well

    @property
    def turned(self) -> Quantized:
        return Quantized(self.other, self.scale)


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


def quantize_both(arrays: Sequence[jax.Array], dtype, make: Callable = lambda x: x, *, interpret=False) -> Quantized:
    """make(*arrays), float32, of matrices (M, N), quantised in both layouts. make works element by element.

    What it makes is not written in between: once it is computed for its largest element, and once to be rounded.
    """
    scale = scale_of(jnp.max(jnp.abs(make(*(x.astype(jnp.float32) for x in arrays)))), dtype)
    if not interpret and not by_kernels(arrays[0]):
        largest = scale * float(jnp.finfo(dtype).max)
        values = quantize(make(*(x.astype(jnp.float32) for x in arrays)), dtype, largest).values
        return Quantized(values, scale, values.T)
    (M, N), most = arrays[0].shape, float(jnp.finfo(dtype).max)
    rows, columns = (math.gcd(n, t) for n, t in zip((M, N), TILE))

    def round_both(scale_ref, *refs):
        *read, values_ref, other_ref = refs
        x = make(*(ref[...].astype(jnp.float32) for ref in read)) * (1.0 / scale_ref[0])
        values = jnp.clip(x, -most, most).astype(dtype)
        values_ref[...] = values
        other_ref[...] = values.T

    tile = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    values, other = pl.pallas_call(
        round_both,
        grid=(M // rows, N // columns),
        in_specs=[pl.BlockSpec((1,), lambda i, j: (0,))] + [tile] * len(arrays),
        out_specs=[tile, pl.BlockSpec((columns, rows), lambda i, j: (j, i))],
        out_shape=[jax.ShapeDtypeStruct((M, N), dtype), jax.ShapeDtypeStruct((N, M), dtype)],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )(scale.reshape(1), *arrays)
    return Quantized(values, scale, other)


def dot(a: Quantized, b: Quantized, contract: tuple[int, int] = (1, 1), out=jnp.bfloat16) -> jax.Array:
    """The product of two matrices over axes `contract`, in dtype `out`.

    It is summed in float32 where one is e5m2, so a gradient. Else an H100's tensor cores keep some 14 bits of a sum
    (cuBLASLt's fast accumulation), which is enough over a model's width and not over the tokens of a batch.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if devices.platform() == "gpu":
        wide = [q.values.astype(jnp.bfloat16) * q.scale.astype(jnp.bfloat16) for q in (a, b)]
        exact = E5M2 in (a.values.dtype, b.values.dtype)
        precision = jax.lax.Precision.HIGHEST if exact else None  # how XLA is told
        return jax.lax.dot_general(*wide, dims, precision=precision, preferred_element_type=out)
    y = jax.lax.dot_general(a.values, b.values, dims, preferred_element_type=jnp.float32)
    return (y * (a.scale * b.scale)).astype(out)


def worthwhile(weight_shape: tuple[int, ...]) -> bool:
    """Whether a matrix is large and even enough; gates and the like stay in 16 bits."""
    return all(n % MULTIPLE == 0 and n >= SMALLEST for n in weight_shape)


@jax.custom_vjp
def products(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x (..., in) times each of weights (out, in), transposed: (..., out) in x's dtype, by 8-bit products both ways."""
    return _products_fwd(x, weights)[0]


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`products` of one weight."""
    return products(x, (weight,))[0]


def _matrix(x):
    return x.reshape(-1, x.shape[-1])


def _products_fwd(x, weights):
    x8, weights8 = quantize_both([_matrix(x)], E4M3), tuple(quantize_both([w], E4M3) for w in weights)
    out = tuple(dot(x8, w8, out=x.dtype).reshape(*x.shape[:-1], -1) for w8 in weights8)
    return out, (x8.turned, tuple(w8.turned for w8 in weights8), _types(x, *weights))


def _products_bwd(kept, dys):
    x8, weights8, (x_like, *likes) = kept
    dys8 = [quantize_both([_matrix(dy)], E5M2) for dy in dys]
    dx = sum(dot(dy8, w8, out=x_like.dtype) for dy8, w8 in zip(dys8, weights8))
    dws = tuple(dot(dy8.turned, x8, out=like.dtype) for dy8, like in zip(dys8, likes))
    return dx.reshape(*dys[0].shape[:-1], -1), dws


products.defvjp(_products_fwd, _products_bwd)


def _types(*arrays):
    """Empty arrays that carry the types of these to the backward pass."""
    return tuple(jnp.zeros((0,), x.dtype) for x in arrays)


def _relu_squared(h):
    return jnp.square(jnp.maximum(h, 0.0))


def _relu_squared_gradient(h, da):
    return 2.0 * jnp.maximum(h, 0.0) * da


@jax.custom_vjp
def mlp(x: jax.Array, fc: jax.Array, proj: jax.Array) -> jax.Array:
    """relu(x fc^T)^2 proj^T for x (..., D), fc (F, D), proj (D, F), by 8-bit products; the square is never written."""
    return _mlp_fwd(x, fc, proj)[0]


def _mlp_fwd(x, fc, proj):
    x8, fc8, proj8 = (quantize_both([m], E4M3) for m in (_matrix(x), fc, proj))
    h = dot(x8, fc8, out=x.dtype)
    a8 = quantize_both([h], E4M3, _relu_squared)
    y = dot(a8, proj8, out=x.dtype).reshape(x.shape)
    return y, (x8.turned, fc8.turned, h, a8.turned, proj8.turned, _types(fc, proj))


def _mlp_bwd(kept, dy):
    x8, fc8, h, a8, proj8, (fc_like, proj_like) = kept
    dy8 = quantize_both([_matrix(dy)], E5M2)
    da = dot(dy8, proj8, out=h.dtype)
    dh8 = quantize_both([h, da], E5M2, _relu_squared_gradient)
    dx = dot(dh8, fc8, out=dy.dtype).reshape(dy.shape)
    return dx, dot(dh8.turned, x8, out=fc_like.dtype), dot(dy8.turned, a8, out=proj_like.dtype)


mlp.defvjp(_mlp_fwd, _mlp_bwd)

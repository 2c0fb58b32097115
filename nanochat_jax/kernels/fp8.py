"""Matrix products in 8-bit floats, with one scale for a whole tensor, taken from its largest element when it is used.

Micikevicius et al., arXiv 2209.05433: e4m3 for activations and weights, e5m2, with the larger range, for gradients. The
backward pass of y = x W^T, dx = dy W and dW = dy^T x, reuses what the forward pass has quantised: one byte is kept for
every activation, not two. An H100's 8-bit products sum over the last axis of both operands, so that the three need
every array in both layouts, which one kernel writes as it quantises.

On a GPU a product is written in the numbers that the bytes stand for, values times scale, which XLA turns into
cuBLASLt's 8-bit product on an H100 and later. Elsewhere products are emulated, to the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nanochat_jax import devices
from nanochat_jax.kernels.launch import by_kernels, launch

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
_TINY = 1e-12  # the least largest element, where all are 0
MULTIPLE, SMALLEST = 16, 128  # both dimensions of a matrix: what the tensor cores want, and what is worth the casts
TILE = (128, 64)  # of a program that writes both layouts


class Quantized(NamedTuple):
    """values in 8 bits times scale, a float32 scalar that bfloat16 holds as well."""

    values: jax.Array
    scale: jax.Array


def scale_of(largest: jax.Array, dtype) -> jax.Array:
    """The scale by which `largest`, a scalar, becomes the largest number of `dtype`."""
    scale = jnp.maximum(largest.astype(jnp.float32), _TINY) / float(jnp.finfo(dtype).max)
    return scale.astype(jnp.bfloat16).astype(jnp.float32)


def quantize(x: jax.Array, dtype=E4M3, largest: jax.Array | None = None) -> Quantized:
    """x (any shape) so that its largest element (`largest`, where known) becomes the largest number of `dtype`."""
    most = float(jnp.finfo(dtype).max)
    scale = scale_of(jnp.max(jnp.abs(x)) if largest is None else largest, dtype)
    scaled = x.astype(jnp.float32) / scale
    return Quantized(jnp.clip(scaled, -most, most).astype(dtype), scale)


def quantize_both(arrays: Sequence[jax.Array], dtype, make: Callable = lambda x: x) -> tuple[Quantized, Quantized]:
    """make(*arrays), float32, of matrices (M, N), quantised, and its transpose. make works element by element.

    What it makes is not written in between: once it is computed for its largest element, and once to be rounded.
    """
    scale = scale_of(jnp.max(jnp.abs(make(*(x.astype(jnp.float32) for x in arrays)))), dtype)
    if by_kernels(arrays[0]):
        return _round_both(arrays, dtype, make, scale)
    largest = scale * float(jnp.finfo(dtype).max)
    values = quantize(make(*(x.astype(jnp.float32) for x in arrays)), dtype, largest).values
    return Quantized(values, scale), Quantized(values.T, scale)


def _round_both(arrays, dtype, make, scale) -> tuple[Quantized, Quantized]:
    """As `quantize_both`, in one kernel that writes both layouts."""
    (M, N), most = arrays[0].shape, float(jnp.finfo(dtype).max)
    rows, columns = (math.gcd(n, t) for n, t in zip((M, N), TILE))

    def round_both(scale_ref, *refs):
        *read, values_ref, transposed_ref = refs
        x = make(*(ref[...].astype(jnp.float32) for ref in read)) * (1.0 / scale_ref[0])
        values = jnp.clip(x, -most, most).astype(dtype)
        values_ref[...] = values
        transposed_ref[...] = values.T

    tile = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    inputs = [(scale.reshape(1), pl.BlockSpec((1,), lambda i, j: (0,))), *((x, tile) for x in arrays)]
    outputs = [(tile, (M, N), dtype), (pl.BlockSpec((columns, rows), lambda i, j: (j, i)), (N, M), dtype)]
    values, transposed = launch(round_both, (M // rows, N // columns), inputs, outputs, warps=8)
    return Quantized(values, scale), Quantized(transposed, scale)


def dot(a: Quantized, b: Quantized, contract: tuple[int, int] = (1, 1), out=jnp.bfloat16) -> jax.Array:
    """The product of two matrices over axes `contract`, in dtype `out`.

    It is summed in float32 where one is e5m2, so a gradient. Else an H100's tensor cores keep some 14 bits of a sum
    (cuBLASLt's fast accumulation), which is enough over a model's width and not over the tokens of a batch.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if devices.platform() == "gpu":
        wide_a, wide_b = (q.values.astype(jnp.bfloat16) * q.scale.astype(jnp.bfloat16) for q in (a, b))
        exact = E5M2 in (a.values.dtype, b.values.dtype)
        precision = jax.lax.Precision.HIGHEST if exact else None  # how XLA is told
        return jax.lax.dot_general(wide_a, wide_b, dims, precision=precision, preferred_element_type=out)
    y = jax.lax.dot_general(a.values, b.values, dims, preferred_element_type=jnp.float32)
    return (y * (a.scale * b.scale)).astype(out)


def worthwhile(weight_shape: tuple[int, ...]) -> bool:
    """Whether a matrix is large and even enough; gates and the like stay in 16 bits."""
    return all(n % MULTIPLE == 0 and n >= SMALLEST for n in weight_shape)


@jax.custom_vjp
def products(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x (..., in) times each of weights (out, in), transposed, in x's dtype: (..., out). 8-bit products both ways."""
    return _products_fwd(x, weights)[0]


def _matrix(x):
    return x.reshape(-1, x.shape[-1])


def _products_fwd(x, weights):
    x8, x8_T = quantize_both([_matrix(x)], E4M3)
    weights8, weights8_T = zip(*(quantize_both([w], E4M3) for w in weights))
    out = tuple(dot(x8, w8, out=x.dtype).reshape(*x.shape[:-1], -1) for w8 in weights8)
    return out, (x8_T, weights8_T)


def _products_bwd(kept, dys):
    (x8_T, weights8_T), dtype = kept, dys[0].dtype
    dys8 = [quantize_both([_matrix(dy)], E5M2) for dy in dys]
    dx = sum(dot(dy8, w8_T, out=dtype) for (dy8, _), w8_T in zip(dys8, weights8_T))
    dws = tuple(dot(dy8_T, x8_T, out=dtype) for _, dy8_T in dys8)
    return dx.reshape(*dys[0].shape[:-1], -1), dws


products.defvjp(_products_fwd, _products_bwd)


def _relu_squared(h):
    return jnp.square(jnp.maximum(h, 0.0))


def _relu_squared_gradient(h, da):
    return 2.0 * jnp.maximum(h, 0.0) * da


@jax.custom_vjp
def mlp(x: jax.Array, fc: jax.Array, proj: jax.Array) -> jax.Array:
    """relu(x fc^T)^2 proj^T for x (..., D), fc (F, D), proj (D, F), by 8-bit products; the square is never written."""
    return _mlp_fwd(x, fc, proj)[0]


def _mlp_fwd(x, fc, proj):
    (x8, x8_T), (fc8, fc8_T), (proj8, proj8_T) = (quantize_both([m], E4M3) for m in (_matrix(x), fc, proj))
    h = dot(x8, fc8, out=x.dtype)
    a8, a8_T = quantize_both([h], E4M3, _relu_squared)
    return dot(a8, proj8, out=x.dtype).reshape(x.shape), (x8_T, fc8_T, h, a8_T, proj8_T)


def _mlp_bwd(kept, dy):
    x8_T, fc8_T, h, a8_T, proj8_T = kept
    dy8, dy8_T = quantize_both([_matrix(dy)], E5M2)
    da = dot(dy8, proj8_T, out=h.dtype)
    dh8, dh8_T = quantize_both([h, da], E5M2, _relu_squared_gradient)
    dx = dot(dh8, fc8_T, out=dy.dtype).reshape(dy.shape)
    return dx, dot(dh8_T, x8_T, out=dy.dtype), dot(dy8_T, a8_T, out=dy.dtype)


mlp.defvjp(_mlp_fwd, _mlp_bwd)

"""The operations between a layer's products, on a GPU in one pass over memory each, by Pallas kernels.

XLA reads an array once for its norm, again to apply it, and once more in the backward pass: a fifth of a step at depth
24. Here every row is read once, kept in registers, and written once. Everywhere else, and where XLA partitions the
program, the functions are the plain formulas below.

Shapes: B batch, T time, D width, H heads, N head size. Kernels compute in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nanochat_jax import devices
from nanochat_jax.kernels.launch import ROWS, by_kernels, launch

TIMES = 16  # positions of a program of the rotation's; its loop runs over heads, which share their angles


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square along the last axis, no parameters; computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


@jax.custom_vjp
def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (Primer: arXiv 2109.08668); the backward pass takes max(x, 0) from the root of the result."""
    return jnp.square(jax.nn.relu(x))


def _relu_squared_bwd(y, dy):
    return ((2.0 * jnp.sqrt(y.astype(jnp.float32)) * dy.astype(jnp.float32)).astype(dy.dtype),)


relu_squared.defvjp(lambda x: (relu_squared(x),) * 2, _relu_squared_bwd)


def rotate_and_norm(x: jax.Array, rope: tuple[jax.Array, jax.Array], gain: float, eps: float) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + N/2}) by minus the angle, then the RMS norm times `gain`. x (B, T, H, N).

    rope: cos and sin (T, 1, N/2), or (B, T, 1, N/2). A rotation keeps the norm, which is therefore taken of x itself.
    """
    if rope[0].ndim == 3 and by_kernels(x) and x.shape[1] % TIMES == 0:
        return _rotate(x, *(t[:, 0] for t in rope), gain, eps)
    x32 = x.astype(jnp.float32)
    x32 = x32 * (gain * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps))
    if devices.platform() == "cpu":  # a tenth of a small model's step faster, in loops over all of a head
        exchanged = jnp.roll(x32, x.shape[-1] // 2, axis=-1)
    else:  # halves exchanged and not cut out: XLA makes one kernel of it
        exchanged = x32.reshape(*x.shape[:-1], 2, -1)[..., ::-1, :].reshape(x.shape)
    cos, sin = rope
    cos, sin = (jnp.concatenate(halves, axis=-1) for halves in ((cos, cos), (sin, -sin)))
    return (x32 * cos + exchanged * sin).astype(x.dtype)


def add_and_norm(x: jax.Array, change: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """y = x + change (..., D), and its RMS norm."""
    if by_kernels(x):
        return _add(x, change, eps)
    y = x + change
    return y, rms_norm(y, eps)


def mix_and_norm(x, change, x0, r, s, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y = r (x + change) + s x0 (..., D), its RMS norm, and x0 for the next layer; change None: 0; r and s scalars.

    x0 is handed from layer to layer so that its gradient is added up where it is made.
    """
    if change is not None and by_kernels(x):
        return _mix(x, change, x0, r, s, eps)
    r, s = r.astype(x.dtype), s.astype(x.dtype)
    y = r * (x if change is None else x + change) + s * x0
    return y, rms_norm(y, eps), x0


def _pieces(width: int):
    """Slices of powers of two, which Triton wants, that make up the width."""
    out, start = [], 0
    for bit in reversed(range(width.bit_length())):
        if width >> bit & 1:
            out.append(pl.ds(start, 1 << bit))
            start += 1 << bit
    return out


def _read(ref) -> list[jax.Array]:
    """A block (ROWS, D) as float32 pieces."""
    return [ref[:, piece].astype(jnp.float32) for piece in _pieces(ref.shape[-1])]


def _write(ref, pieces) -> None:
    for piece, x in zip(_pieces(ref.shape[-1]), pieces):
        ref[:, piece] = x.astype(ref.dtype)


def _dot(a, b):
    """The dot product of each row, (ROWS, 1)."""
    return sum(jnp.sum(x * y, axis=1, keepdims=True) for x, y in zip(a, b))


def _inverse_rms(y, eps: float) -> jax.Array:
    return jax.lax.rsqrt(_dot(y, y) / sum(piece.shape[-1] for piece in y) + eps)


def _write_with_norm(y_ref, n_ref, pieces, eps: float) -> None:
    """y and its RMS norm, which is that of y as rounded to y_ref's type."""
    y = [x.astype(y_ref.dtype).astype(jnp.float32) for x in pieces]
    scale = _inverse_rms(y, eps)
    _write(y_ref, y)
    _write(n_ref, [a * scale for a in y])


def _gradient_of_norm(y, dy, dn, eps: float) -> list[jax.Array]:
    """The gradient of y, from dy, its own, and dn, that of its norm."""
    scale = _inverse_rms(y, eps)
    along = _dot(dn, y) / sum(piece.shape[-1] for piece in y) * scale * scale
    return [g + scale * (d - a * along) for a, g, d in zip(y, dy, dn)]


def _add_forward(x_ref, change_ref, y_ref, n_ref, *, eps):
    _write_with_norm(y_ref, n_ref, [a + b for a, b in zip(_read(x_ref), _read(change_ref))], eps)


def _add_backward(y_ref, dy_ref, dn_ref, dx_ref, *, eps):
    _write(dx_ref, _gradient_of_norm(_read(y_ref), _read(dy_ref), _read(dn_ref), eps))


def _mix_forward(x_ref, change_ref, x0_ref, r_ref, s_ref, y_ref, n_ref, *, eps):
    r, s = r_ref[0], s_ref[0]
    mixed = [r * (a + b) + s * c for a, b, c in zip(_read(x_ref), _read(change_ref), _read(x0_ref))]
    _write_with_norm(y_ref, n_ref, mixed, eps)


def _mix_backward(y_ref, x0_ref, dy_ref, dn_ref, later_ref, r_ref, s_ref, dx_ref, dx0_ref, gy_ref, gx0_ref, *, eps):
    """later: x0's gradient from the layers above; gy and gx0: row by row the gradient times y and times x0."""
    r, s, y, x0 = r_ref[0], s_ref[0], _read(y_ref), _read(x0_ref)
    g = _gradient_of_norm(y, _read(dy_ref), _read(dn_ref), eps)
    _write(dx_ref, [r * a for a in g])
    _write(dx0_ref, [a + s * b for a, b in zip(_read(later_ref), g)])
    gy_ref[...] = jnp.sum(_dot(g, y), axis=1)
    gx0_ref[...] = jnp.sum(_dot(g, x0), axis=1)


def _over_rows(kernel, eps, arrays, scalars=(), outs: int = 2, sums: int = 0):
    """The kernel over programs of ROWS rows: arrays (..., D) in and `outs` like them out, and `sums` of (rows,)."""
    like = arrays[0]
    flat = [a.reshape(-1, a.shape[-1]) for a in arrays]
    rows, width = flat[0].shape
    block, each = pl.BlockSpec((ROWS, width), lambda i: (i, 0)), pl.BlockSpec((ROWS,), lambda i: (i,))
    inputs = [(a, block) for a in flat]
    inputs += [(jnp.asarray(s, jnp.float32).reshape(1), pl.BlockSpec((1,), lambda i: (0,))) for s in scalars]
    outputs = [(block, (rows, width), like.dtype)] * outs + [(each, (rows,), jnp.float32)] * sums
    found = launch(functools.partial(kernel, eps=eps), (rows // ROWS,), inputs, outputs, warps=4)
    return [a.reshape(like.shape) for a in found[:outs]] + list(found[outs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add(x, change, eps: float):
    return tuple(_over_rows(_add_forward, eps, (x, change)))


def _add_fwd(x, change, eps):
    y, n = _add(x, change, eps)
    return (y, n), y


def _add_bwd(eps, y, given):
    (dx,) = _over_rows(_add_backward, eps, (y, *given), outs=1)
    return dx, dx


_add.defvjp(_add_fwd, _add_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mix(x, change, x0, r, s, eps: float):
    return *_over_rows(_mix_forward, eps, (x, change, x0), (r, s)), x0


def _mix_fwd(x, change, x0, r, s, eps):
    y, n, x0 = _mix(x, change, x0, r, s, eps)
    return (y, n, x0), (y, x0, r, s)


def _mix_bwd(eps, kept, given):
    """x + change is not kept but recomputed as (y - s x0) / r: r stays near one."""
    y, x0, r, s = kept
    dx, dx0, gy, gx0 = _over_rows(_mix_backward, eps, (y, x0, *given), (r, s), sums=2)
    ds = gx0.sum()
    dr = (gy.sum() - s.astype(jnp.float32) * ds) / r.astype(jnp.float32)
    return dx, dx, dx0, dr.astype(r.dtype), ds.astype(s.dtype)


_mix.defvjp(_mix_fwd, _mix_bwd)


def _halves(ref, head) -> tuple[jax.Array, jax.Array]:
    """Both halves of a head's channels, (TIMES, N/2) float32."""
    half = ref.shape[-1] // 2
    return tuple(ref[:, head, pl.ds(start, half)].astype(jnp.float32) for start in (0, half))


def _put_halves(ref, head, first, second) -> None:
    half = ref.shape[-1] // 2
    ref[:, head, pl.ds(0, half)] = first.astype(ref.dtype)
    ref[:, head, pl.ds(half, half)] = second.astype(ref.dtype)


def _rotate_forward(x_ref, cos_ref, sin_ref, y_ref, *, gain, eps):
    cos, sin = cos_ref[...], sin_ref[...]

    def one(head, _):
        a, b = _halves(x_ref, head)
        scale = gain * _inverse_rms((a, b), eps)
        a, b = a * scale, b * scale
        _put_halves(y_ref, head, a * cos + b * sin, b * cos - a * sin)

    jax.lax.fori_loop(0, x_ref.shape[1], one, None)


def _rotate_backward(x_ref, dy_ref, cos_ref, sin_ref, dx_ref, *, gain, eps):
    cos, sin = cos_ref[...], sin_ref[...]

    def one(head, _):
        a, b = _halves(x_ref, head)
        c, d = _halves(dy_ref, head)
        c, d = gain * (c * cos - d * sin), gain * (c * sin + d * cos)
        zeros = jnp.zeros_like(a)
        _put_halves(dx_ref, head, *_gradient_of_norm((a, b), (zeros, zeros), (c, d), eps))

    jax.lax.fori_loop(0, x_ref.shape[1], one, None)


def _over_times(kernel, gain, eps, arrays, cos, sin) -> jax.Array:
    """The kernel over programs of TIMES positions: arrays (B, T, H, N) in and one like them out."""
    (B, T, H, N), dtype = arrays[0].shape, arrays[0].dtype
    block = pl.BlockSpec((None, TIMES, H, N), lambda i, b: (b, i, 0, 0))
    angles = pl.BlockSpec((TIMES, N // 2), lambda i, b: (i, 0))
    inputs = [*((a, block) for a in arrays), (cos, angles), (sin, angles)]
    kernel = functools.partial(kernel, gain=gain, eps=eps)
    return launch(kernel, (T // TIMES, B), inputs, [(block, (B, T, H, N), dtype)], warps=4)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rotate(x, cos, sin, gain: float, eps: float):
    return _over_times(_rotate_forward, gain, eps, (x,), cos, sin)


def _rotate_bwd(gain, eps, kept, dy):
    x, cos, sin = kept
    return _over_times(_rotate_backward, gain, eps, (x, dy), cos, sin), None, None


_rotate.defvjp(lambda x, cos, sin, gain, eps: (_rotate(x, cos, sin, gain, eps), (x, cos, sin)), _rotate_bwd)

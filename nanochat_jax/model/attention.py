"""Causal attention with an optional sliding window: one entry point, and a table of backends to choose from.

`cudnn` is NVIDIA's kernel; `flash` is FlashAttention 3 on a Hopper and 2 elsewhere (arXiv 2407.08608, 2307.08691), if
`dew-flash-attn-cu13` is installed, which needs jax 0.11.2; `blocks` is plain XLA over blocks of queries, each of which
reads only the keys in its window, so that neither a (T, T) mask nor what it would hide is computed. Which is fastest
depends on the device and the shape: `choose` measures it once, before a program is traced, and remembers. Where nothing
was measured, `default_backend` is used.

Shapes: B batch, T time, H query heads, K key/value heads (H a multiple of K), N head size.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import devices
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, digest_of, read_json
from nanochat_jax.mesh import hosts
from nanochat_jax.model.remat import ATTENTION, named

_MASKED = -1e30  # finite: a row of -inf would make the softmax NaN


class Shape(NamedTuple):
    """What a choice depends on; not on the rows of a batch, each of which is a program of its own."""

    T: int
    H: int
    K: int
    N: int
    dtype: str
    window: int | None  # None: all

    @property
    def is_half(self) -> bool:
        return jnp.dtype(self.dtype).itemsize == 2

    def __str__(self) -> str:
        return f"T={self.T} H={self.H} K={self.K} N={self.N} {self.dtype} window={self.window}"


class Backend(NamedTuple):
    run: Callable  # (q, k, v, window) -> (B, T, H, N)
    takes: Callable[[Shape, str], bool]  # of a shape on a platform: nvidia, gpu (another maker's), tpu or cpu
    package: str = ""  # what must be installed for it
    module: str = ""  # of that package

    @property
    def installed(self) -> bool:
        return not self.module or importlib.util.find_spec(self.module) is not None


@jax.named_scope("attention")
def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, *, backend: str | None = None
) -> jax.Array:
    """Softmax attention of scale 1/sqrt(N): position t sees itself and the `window` positions before it (None: all).

    q (B, T, H, N), k and v (B, T, K, N) -> (B, T, H, N) in q's dtype; the softmax is computed in float32. backend: one
    of BACKENDS; by default what `choose` found for the shape.
    """
    _, T, H, N = q.shape
    shape = Shape(T, H, k.shape[2], N, str(q.dtype), _bounded(window, T))
    name = backend or _chosen.get(shape) or ("blocks" if devices.partitioned() else default_backend(q.dtype))
    return BACKENDS[name].run(q, k, v, shape.window)


def is_offset(head_dim: int) -> np.ndarray:
    """(N,) bool, which channels of a key are those of the position before, where a model has `key_offset`: the half
    that rotates slowly, and so hardly says where it is. A query then finds what followed a token in one layer, where
    else it takes two (modded-nanogpt's record of December 2025)."""
    return np.arange(head_dim) % (head_dim // 2) >= head_dim // 4


def offset_keys(k: jax.Array) -> jax.Array:
    """Rotated keys (B, T, K, N) with half of each from the position before, 0 before the first."""
    before = jnp.pad(k[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    return jnp.where(is_offset(k.shape[-1]), before, k)


def default_backend(dtype) -> str:
    """cudnn takes 16-bit floats on NVIDIA only."""
    return "cudnn" if jnp.dtype(dtype).itemsize == 2 and devices.has_cudnn() else "blocks"


def _bounded(window: int | None, T: int) -> int | None:
    """None where the window hides nothing of T positions."""
    return None if window is None or window >= T - 1 else window


def _cudnn(q, k, v, window):
    # is_causal stays beside the window: a left window alone looks into the future (jax-ml/jax#39576).
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=None if window is None else (window, 0), implementation="cudnn"
    )


def _flash(q, k, v, window):
    kernels = importlib.import_module("dew_flash_attn")
    return kernels.flash_mha(q, k, v, is_causal=True, window_size=(-1 if window is None else window, 0))


def _block_size(T: int, window: int | None) -> int:
    """Small enough to skip what the mask hides, large enough to make the matrix products worth a launch."""
    return min(T, max(128, T // 8) if window is None else max(64, min(window, 256)))


def _block_pairs(T: int, window: int | None):
    """Yields for each block (queries, keys in their windows, the mask between them)."""
    size = _block_size(T, window)
    for start in range(0, T, size):
        end, first = min(start + size, T), 0 if window is None else max(0, start - window)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance <= window)
        yield slice(start, end), slice(first, end), seen


_sum32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_blocks(q, k, v, window):
    """q (B, K, G, T, N), scaled, k and v (B, K, T, N) -> as q."""
    return _in_blocks_fwd(q, k, v, window)[0]


def _in_blocks_fwd(q, k, v, window):
    """Keeps each row's log-sum-exp, from which the backward pass recomputes the probabilities, as FlashAttention does
    (arXiv 2205.14135): less memory, and no gradients that autodiff would pad and add."""
    out, log_sums = [], []
    for rows, keys, seen in _block_pairs(q.shape[3], window):
        scores = _sum32("bkgtn,bksn->bkgts", q[..., rows, :], k[:, :, keys])
        scores = jnp.where(seen, scores, _MASKED)
        most = scores.max(axis=-1, keepdims=True)
        e = jnp.exp(scores - most)
        total = e.sum(axis=-1, keepdims=True)
        y = _sum32("bkgts,bksn->bkgtn", e.astype(v.dtype), v[:, :, keys])
        out.append((y / total).astype(q.dtype))
        log_sums.append(most + jnp.log(total))
    y, log_sum = (named(jnp.concatenate(x, axis=3), ATTENTION) for x in (out, log_sums))
    return y, (q, k, v, y, log_sum)


def _in_blocks_bwd(window, kept, dy):
    q, k, v, y, log_sums = kept
    delta = _sum32("bkgtn,bkgtn->bkgt", y, dy)[..., None]
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, keys, seen in _block_pairs(q.shape[3], window):
        qs, dys, ks, vs = q[..., rows, :], dy[..., rows, :], k[:, :, keys], v[:, :, keys]
        probs = jnp.exp(_sum32("bkgtn,bksn->bkgts", qs, ks) - log_sums[..., rows, :])
        probs = jnp.where(seen, probs, 0.0)
        ds = probs * (_sum32("bkgtn,bksn->bkgts", dys, vs) - delta[..., rows, :])
        probs, ds = probs.astype(q.dtype), ds.astype(q.dtype)
        dq.append(_sum32("bkgts,bksn->bkgtn", ds, ks).astype(q.dtype))
        dk = dk.at[:, :, keys].add(_sum32("bkgts,bkgtn->bksn", ds, qs))
        dv = dv.at[:, :, keys].add(_sum32("bkgts,bkgtn->bksn", probs, dys))
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype)


_in_blocks.defvjp(_in_blocks_fwd, _in_blocks_bwd)


def _blocks(q, k, v, window):
    B, T, H, N = q.shape
    K = k.shape[2]
    q = (q * N**-0.5).reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4)
    y = _in_blocks(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), window)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


def _half_on_nvidia(shape: Shape, platform: str) -> bool:
    return platform == "nvidia" and shape.is_half and shape.N % 8 == 0 and shape.N <= 256


BACKENDS = {
    "cudnn": Backend(_cudnn, _half_on_nvidia),
    "flash": Backend(_flash, _half_on_nvidia, "dew-flash-attn-cu13", "dew_flash_attn"),
    "blocks": Backend(_blocks, lambda s, platform: True),
}

# ----------------------------------------------------------------------------------------------------- the choice

MEASURED_FROM = 1024  # positions; with fewer, attention is too small a part of a step to be worth measuring
TOLERANCE = 0.01  # of the output's and each gradient's norm; bfloat16 comes to 0.004, a window off by one to 0.03
_ROUNDS, _CALLS = 10, 5  # the fastest round counts

_chosen: dict[Shape, str] = {}


def takers(shape: Shape) -> list[str]:
    """The backends that take a shape on the platform that programs are traced for."""
    return [name for name, backend in BACKENDS.items() if backend.installed and backend.takes(shape, _platform())]


def _platform() -> str:
    return "nvidia" if devices.has_cudnn() else devices.platform()


def shapes_of(cfg, T: int, dtype) -> list[Shape]:
    """The distinct shapes of attention in the layers of a GPTConfig over rows of T."""
    windows = dict.fromkeys(_bounded(w, T) for w in cfg.windows)
    return [Shape(T, cfg.n_head, cfg.n_kv_head, cfg.head_dim, str(jnp.dtype(dtype)), w) for w in windows]


def choose(
    shapes: Iterable[Shape],
    rows: int,
    cache: Path,
    setting: str = "auto",
    *,
    split_heads: bool = False,
    say: Callable[[str], None] = print,
) -> dict[Shape, str]:
    """Chooses the backend of each shape for all programs traced from now on. Called by all hosts, outside of a trace.

    A shape that several backends take is measured on this device with `rows` of a batch, forward and backward, unless
    `cache`/attention.json has it; process 0's choice holds for all. setting: auto, or a backend to use unmeasured;
    UserError if it does not take a shape. split_heads: the mesh splits heads, which no kernel supports.
    """
    found: dict[Shape, str] = {}
    unknown = []
    for shape in shapes:
        _chosen.pop(shape, None)
        able = [name for name in takers(shape) if name == "blocks" or not split_heads]
        if setting in able:
            found[shape] = setting
        elif setting != "auto" and not BACKENDS[setting].installed:
            raise UserError(
                f"attention={setting} needs the package {BACKENDS[setting].package}, which is not installed"
            )
        elif setting != "auto":
            where = f"{_platform()}, heads split by mesh.tensor" if split_heads else _platform()
            raise UserError(
                f"attention={setting} does not take {shape} here ({where}); take attention=auto or one of "
                f"{', '.join(able)}"
            )
        elif len(able) > 1 and shape.T >= MEASURED_FROM:
            unknown.append(shape)
    if unknown:
        names = _measured(unknown, rows, cache, say) if hosts.is_main() else []
        found.update(zip(unknown, hosts.gather("attention", names)[0]))
    _chosen.update(found)
    return found


def _measured(shapes: list[Shape], rows: int, cache: Path, say) -> list[str]:
    """The fastest backend of each shape, measured now or before, as the cache's file says."""
    path = Path(cache) / "attention.json"
    known, place = read_json(path) or {}, _place()
    here = known.setdefault(place, {})
    for shape in shapes:
        if here.get(str(shape), {}).get("backend") in BACKENDS:
            continue
        milliseconds, left_out = measure(shape, rows)
        best = min(milliseconds, key=milliseconds.__getitem__, default=default_backend(shape.dtype))
        here[str(shape)] = {"backend": best, "rows": rows, "ms": milliseconds, "left_out": left_out}
        atomic_write_json(path, known)
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in milliseconds.items())
        say(f"attention {shape}: {best}, of {times or 'none'} for {rows} rows forward and backward")
        for name, why in left_out.items():
            say(f"attention {shape}: {name} left out: {why}")
    return [here[str(shape)]["backend"] for shape in shapes]


def _place() -> str:
    """What was measured, and on what."""
    kernels = digest_of([Path(__file__)])[:12]
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, kernels {kernels}"


def measure(shape: Shape, rows: int) -> tuple[dict[str, float], dict[str, str]]:
    """By backend, milliseconds of forward and backward with `rows`; and by backend that was left out, the reason.

    The output and the gradients of one row are first compared with those of `blocks` in float32.
    """
    with jax.default_matmul_precision("highest"):
        one = [x.astype(jnp.float32) for x in _random(shape, 1)]
        want = _with_gradients(BACKENDS["blocks"], shape)(*one)
    fit, left_out = {}, {}
    for name in takers(shape):
        try:
            f = _with_gradients(BACKENDS[name], shape)
            errors = {of: _error(a, b) for of, a, b in zip(("output", "dq", "dk", "dv"), f(*_random(shape, 1)), want)}
            wrong = [f"{of} is off by {e:.1%}" for of, e in errors.items() if not e <= TOLERANCE]  # nor where it is NaN
            if wrong:
                left_out[name] = f"{', '.join(wrong)}, of {TOLERANCE:.0%} allowed"
            else:
                jax.block_until_ready(f(*_random(shape, rows)))
                fit[name] = f
        except Exception as e:  # no kernel for this device, or no memory for it: the others are there
            left_out[name] = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"
    args = _random(shape, rows) if fit else []
    # interleaved, so that other load on the device slows all of them alike
    rounds = [{name: _seconds(f, args) for name, f in fit.items()} for _ in range(_ROUNDS)]
    return {name: 1e3 * min(times[name] for times in rounds) for name in fit}, left_out


def _random(shape: Shape, rows: int) -> list[jax.Array]:
    """q, k, v and the output's gradient."""
    heads = (shape.H, shape.K, shape.K, shape.H)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (rows, shape.T, h, shape.N), shape.dtype) for key, h in zip(keys, heads)]


def _with_gradients(backend: Backend, shape: Shape) -> Callable:
    """f(q, k, v, do) -> output, dq, dk, dv."""

    def f(q, k, v, do):
        o, pull = jax.vjp(lambda *x: backend.run(*x, shape.window), q, k, v)
        return o, *pull(do)

    return jax.jit(f)


def _error(got, want) -> float:
    """The norm of the difference over that of `want`."""
    difference = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel())
    return float(difference / jnp.maximum(jnp.linalg.norm(want.ravel()), 1e-30))


def _seconds(f: Callable, args) -> float:
    """Of one call, the mean over several that are queued together."""
    began = time.perf_counter()
    for _ in range(_CALLS):
        out = f(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / _CALLS

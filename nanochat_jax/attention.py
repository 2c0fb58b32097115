"""Causal attention with an optional sliding window: one entry point, one backend per device.

`cudnn` on a GPU that has it, `blocks` elsewhere: plain XLA over blocks of queries, each of which reads only the keys
that its window admits, so that neither a (T, T) mask nor the squares that it would hide are ever computed.

Shapes: B batch, T time, H query heads, K key/value heads (H a multiple of K), N head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nanochat_jax import devices

_MASKED = -1e30  # finite: a row of -inf would make the softmax NaN


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, *, backend: str | None = None
) -> jax.Array:
    """Softmax attention of scale 1/sqrt(N): position t sees itself and the `window` positions before it (None: all).

    q (B, T, H, N), k and v (B, T, K, N) -> (B, T, H, N) in q's dtype; the softmax is computed in float32.
    """
    window = None if window is None or window >= q.shape[1] - 1 else window
    return _BACKENDS[backend or default_backend(q.dtype)](q, k, v, window)


def default_backend(dtype) -> str:
    """cudnn takes 16-bit floats on NVIDIA only."""
    return "cudnn" if jnp.dtype(dtype).itemsize == 2 and devices.has_cudnn() else "blocks"


def _cudnn(q, k, v, window):
    # is_causal stays beside the window: a left window alone looks into the future (jax-ml/jax#39576).
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=None if window is None else (window, 0), implementation="cudnn"
    )


def _block_size(T: int, window: int | None) -> int:
    """Small enough to skip what the mask hides, large enough for the matrix products to be worth their launch."""
    return min(T, max(128, T // 8) if window is None else max(64, min(window, 256)))


def _blocks(q, k, v, window):
    B, T, H, N = q.shape
    K = k.shape[2]
    q = (q * N**-0.5).reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, N)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, K, T, N)
    size = _block_size(T, window)
    out = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None else max(0, start - window)
        scores = jnp.einsum(
            "bkgtn,bksn->bkgts", q[..., start:end, :], k[:, :, first:end], preferred_element_type=jnp.float32
        )
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance <= window)
        probs = jax.nn.softmax(jnp.where(seen, scores, _MASKED), axis=-1).astype(v.dtype)
        out.append(jnp.einsum("bkgts,bksn->bkgtn", probs, v[:, :, first:end]))
    y = jnp.concatenate(out, axis=3)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


_BACKENDS = {"cudnn": _cudnn, "blocks": _blocks}

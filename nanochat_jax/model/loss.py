"""Softcapped cross-entropy in chunks of tokens, with its own gradient.

The logits of a whole batch are the largest array of a small model: 8 x 2048 tokens x 32768 entries in float32 are 2 GB.
Here a scan holds those of one chunk at a time and, while they are there, makes the gradients as well: nothing is
kept for the backward pass but d loss / d hidden and d loss / d head, and nothing is computed twice.

With c = softcap, t = tanh(z / c), e = exp(c t) and s the sum of e over the vocabulary,

    d nll / d z_v = (1 - t_v^2) e_v / s  -  [v = y] (1 - t_y^2).

The target y is left out of the products and has its own term, (1 - t_y^2) (s - e_y) / s, in float32: for a token that
the model is sure of it is the small difference of two numbers near one. What remains is u / s with u = (1 - t^2) e, and
as u does not know s, a block of the vocabulary is finished while it is in the cache.

The loss is a weighted sum over tokens, so that one function serves pretraining (weight 1 / n), SFT (the mask) and the
policy gradient of RL (the advantage).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from nanochat_jax import devices
from nanochat_jax.kernels import cross_entropy, fp8
from nanochat_jax.kernels.products import transposed
from nanochat_jax.kernels.segments import add_rows

CHUNK = 512  # tokens on a CPU
# every chunk adds to the head's gradient, V x D in float32, which a GPU reads and writes from memory, and the product
# for the hidden states' has C x D elements alone to share out; halved where the logits are in float32, for their size
GPU_CHUNK = 8192
EVEN = 128  # rows of a product's tile on a GPU: what chunks are rounded up to
CPU_BLOCK = 4096  # entries of the vocabulary; a chunk's logits of one block are 8 MB, which the last cache holds


def _chunk(tokens: int, chunk: int | None, logits=jnp.float32) -> int:
    """`chunk`, or what suits the device and the logits' type; at most as many as there are, and on a GPU evenly cut."""
    if chunk or devices.platform() == "cpu":
        return min(chunk or CHUNK, tokens)
    most = GPU_CHUNK if jnp.dtype(logits).itemsize < 4 else GPU_CHUNK // 2
    even = -(-tokens // -(-tokens // most))
    return min(even + -even % EVEN, tokens)


def _by_kernels() -> bool:
    return devices.platform() == "gpu" and not devices.partitioned()


def _vocab_blocks(size):
    """Slices of the (padded) vocabulary: all of it at once but on a CPU."""
    block = CPU_BLOCK if devices.platform() == "cpu" else size
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _capped(x, head, softcap):
    """tanh(z / softcap) and exp of the capped logits, (C, V) float32."""
    return _capped_logits(jnp.einsum("cd,vd->cv", x, head, preferred_element_type=jnp.float32), softcap)


def _capped_logits(z, softcap):
    t = jnp.tanh(z / softcap)
    return t, jnp.exp(softcap * t)  # no maximum to subtract: |logit| <= softcap, so the sum stays far below overflow


def _target(x, rows, softcap):
    """The same of the targets alone, (C,); rows (C, D) are the head's of the targets."""
    t = jnp.tanh(jnp.einsum("cd,cd->c", x, rows, preferred_element_type=jnp.float32) / softcap)
    return t, jnp.exp(softcap * t)


def _finish(x, rows, w, rest, softcap):
    """(the weighted nll, w / s, what d loss / d logit of the target is), from the sums of e without the targets."""
    t_y, e_y = _target(x, rows, softcap)
    s = rest + e_y
    return (w * (jnp.log(s) - softcap * t_y)).sum(), w / s, -w * (1.0 - t_y * t_y) * rest / s


def _others(entries, targets, vocab):
    """Which of the vocabulary's `entries` are neither a row's target nor padding, (C, entries)."""
    ids = jnp.arange(entries.start, entries.stop)
    others = ids != targets[:, None]
    return others & (ids < vocab) if entries.stop > vocab else others


def _split(array, chunk):
    """(M, ...) -> (M / chunk, chunk, ...), the end padded with zeros."""
    pad = -array.shape[0] % chunk
    array = jnp.pad(array, [(0, pad)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(-1, chunk, *array.shape[1:])


# A way to sum a chunk: (d loss / d head before the first chunk, the scan's body, how that gradient becomes (V, D)).
# body((loss, d_head), (x (C, D), targets (C,), weights (C,))) -> these two after the chunk, (d loss / dx, d of target)


def _blocks(head, vocab, softcap):
    """Block after block of the vocabulary; a chunk is handed over turned as well, (D, C)."""
    blocks = _vocab_blocks(head.shape[0])

    def body(carry, xs):
        total, d_head = carry
        x, y, w, xt = xs
        rest, dx, us = jnp.zeros_like(w), jnp.zeros(x.shape, jnp.float32), []
        for entries in blocks:
            t, e = _capped(x, head[entries], softcap)
            e = jnp.where(_others(entries, y, vocab), e, 0.0)
            u = (e * (1.0 - t * t)).astype(x.dtype)
            rest = rest + e.sum(axis=-1)
            dx = dx + jnp.einsum("cv,vd->cd", u, head[entries], preferred_element_type=jnp.float32)
            us.append(u)
        rows = head[y]
        nll, w_s, d_y = _finish(x, rows, w, rest, softcap)
        # (D, C) @ (C, V): on a CPU a third faster than the same with V first, and than a product that transposes x
        xt = (xt * w_s).astype(x.dtype)
        d_head = [d + jnp.matmul(xt, u, preferred_element_type=jnp.float32) for d, u in zip(d_head, us, strict=True)]
        dx = dx * w_s[:, None] + d_y[:, None] * rows
        return (total + nll, d_head), (dx.astype(x.dtype), d_y)

    start = [jnp.zeros((head.shape[1], b.stop - b.start), jnp.float32) for b in blocks]
    return start, body, lambda d_head: jnp.concatenate([transposed(d) for d in d_head])


def _kernel(head, vocab, softcap):
    """On a GPU: one kernel between the products, which hand it logits in x's own type."""

    def body(carry, xs):
        total, d_head = carry
        x, y, w = xs
        u, rest = cross_entropy.terms(jnp.einsum("cd,vd->cv", x, head), y, vocab, softcap)
        rows = head[y]
        nll, w_s, d_y = _finish(x, rows, w, rest, softcap)
        weighted = (x * w_s[:, None]).astype(x.dtype)
        d_head = d_head + jnp.einsum("cv,cd->vd", u, weighted, preferred_element_type=jnp.float32)
        dx = jnp.einsum("cv,vd->cd", u, head, preferred_element_type=jnp.float32)
        dx = dx * w_s[:, None] + d_y[:, None] * rows
        return (total + nll, d_head), (dx.astype(x.dtype), d_y)

    return jnp.zeros(head.shape, jnp.float32), body, lambda d_head: d_head


def _eight_bits(head, vocab, softcap):
    """By 8-bit products; the logits' gradient is scaled by its own largest element."""
    head8, whole = fp8.quantize(head), slice(0, head.shape[0])

    def body(carry, xs):
        total, d_head = carry
        x, y, w = xs
        x8 = fp8.quantize(x)
        t, e = _capped_logits(fp8.dot(x8, head8, (1, 1), jnp.float32), softcap)
        e = jnp.where(_others(whole, y, vocab), e, 0.0)
        u = e * (1.0 - t * t)
        rest, most, rows = e.sum(axis=-1), u.max(axis=-1), head[y]
        nll, w_s, d_y = _finish(x, rows, w, rest, softcap)
        g8 = fp8.quantize(u.astype(x.dtype) * w_s[:, None], fp8.E5M2, (most * jnp.abs(w_s)).max())
        dx = fp8.dot(g8, head8, (1, 0), jnp.float32) + d_y[:, None] * rows
        d_head = d_head + fp8.dot(x8, g8, (0, 0), jnp.float32)
        return (total + nll, d_head), (dx.astype(x.dtype), d_y)

    return jnp.zeros(head.shape[::-1], jnp.float32), body, transposed


def _eight_bit_kernels(head, vocab, softcap):
    """The same on a GPU: a kernel for the sums, which the gradient's scale needs, and one that rounds the gradient."""
    head8 = fp8.quantize(head)
    # a barrier, so that it is transposed once and not in every chunk
    head8_T = head8._replace(values=jax.lax.optimization_barrier(head8.values.T))

    def body(carry, xs):
        total, d_head = carry
        x, y, w = xs
        x8 = fp8.quantize(x)
        z = fp8.dot(x8, head8, (1, 1), x.dtype)
        rest, most = cross_entropy.sums(z, y, vocab, softcap)
        rows = head[y]
        nll, w_s, d_y = _finish(x, rows, w, rest, softcap)
        scale = fp8.scale_of((most * jnp.abs(w_s)).max(), fp8.E5M2)
        g, g_T = cross_entropy.rounded(z, y, w_s / scale, vocab, softcap, fp8.E5M2)
        dx = fp8.dot(fp8.Quantized(g, scale), head8_T, (1, 1), jnp.float32) + d_y[:, None] * rows
        d_head = d_head + fp8.dot(fp8.Quantized(g_T, scale), x8, (1, 0), jnp.float32)
        return (total + nll, d_head), (dx.astype(x.dtype), d_y)

    return jnp.zeros(head.shape, jnp.float32), body, lambda d_head: d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _weighted_sum(hidden, head, targets, weights, vocab, softcap, chunk, eight_bits):
    def body(total, xs):
        x, y, w = xs
        t_y, s = _target(x, head[y], softcap)
        for entries in _vocab_blocks(head.shape[0]):
            _, e = _capped(x, head[entries], softcap)
            s = s + jnp.where(_others(entries, y, vocab), e, 0.0).sum(axis=-1)
        return total + (w * (jnp.log(s) - softcap * t_y)).sum(), None

    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights))
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def _weighted_sum_fwd(hidden, head, targets, weights, vocab, softcap, chunk, eight_bits):
    if _by_kernels():
        way = _eight_bit_kernels if eight_bits else _kernel
    else:
        way = _eight_bits if eight_bits else _blocks
    start, body, joined = way(head, vocab, softcap)
    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights))
    if way is _blocks:
        chunks = (*chunks, chunks[0].transpose(0, 2, 1))
    (total, d_head), (dx, d_y) = jax.lax.scan(body, (jnp.float32(0), start), chunks)
    n = hidden.shape[0]
    d_head = add_rows(joined(d_head), hidden, targets, d_y.reshape(-1)[:n])
    return total, (dx.reshape(-1, hidden.shape[-1])[:n], d_head.astype(head.dtype))


def _weighted_sum_bwd(vocab, softcap, chunk, eight_bits, kept, g):
    d_hidden, d_head = kept
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_head).astype(d_head.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def weighted_nll(
    hidden, head, targets, weights, *, vocab: int, softcap: float, chunk: int | None = None, eight_bits: bool = False
) -> jax.Array:
    """sum_t weights_t * -log p(targets_t), a float32 scalar; differentiable in hidden and head only.

    hidden (..., D) and head (padded V, D) in one dtype; targets (...) int32, any negative one is ignored;
    weights (...) float32. Softmax over the first `vocab` entries of softcap * tanh(z / softcap).
    eight_bits: its products in 8-bit floats where a gradient is asked for (`fp8.py`); the target's own term is not.
    """
    targets, weights = targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    weights = jnp.where(targets >= 0, weights, 0.0)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chunk = _chunk(hidden.shape[0], chunk, hidden.dtype if _by_kernels() else jnp.float32)
    return _weighted_sum(hidden, head, jnp.maximum(targets, 0), weights, vocab, softcap, chunk, eight_bits)


def token_nll(hidden, head, targets, *, vocab: int, softcap: float, chunk: int | None = None, entropy: bool = False):
    """Per token: -log p(target) float32 (0 where the target is negative) and the most likely id, shaped as targets.

    entropy: a third array, that of the whole distribution in nats. No gradient: for evaluation, and for what RL weighs
    tokens by. The chunk bounds the memory as in `weighted_nll`.
    """
    shape, targets = targets.shape, targets.reshape(-1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = _chunk(flat.shape[0], chunk)

    def body(_, xs):
        x, y = xs
        t, e = (a[:, :vocab] for a in _capped(x, head, softcap))
        t_y = jnp.take_along_axis(t, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
        s = e.sum(axis=-1)
        nll = jnp.log(s) - softcap * t_y
        found = (jnp.where(y >= 0, nll, 0.0), t.argmax(axis=-1).astype(jnp.int32))
        return None, (*found, jnp.log(s) - softcap * (e * t).sum(axis=-1) / s) if entropy else found

    _, found = jax.lax.scan(body, None, (_split(flat, chunk), _split(targets, chunk)))
    return tuple(a.reshape(-1)[: targets.shape[0]].reshape(shape) for a in found)

"""Softcapped cross-entropy in chunks of tokens, with its own gradient.

The logits of a whole batch are the largest array of a small model: 8 x 2048 tokens x 32768 entries in float32 are 2 GB.
Here a scan holds those of one chunk at a time and, while they are there, makes the gradients as well: nothing is
kept for the backward pass but d loss / d hidden and d loss / d head, and nothing is computed twice.

The loss is a weighted sum over tokens, so that one function serves pretraining (weight 1 / n), SFT (the mask) and the
policy gradient of RL (the advantage).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 1024  # tokens; measured on two cores at vocabulary 32768: 256 and 512 are 6 and 4 % slower


def _capped(x, head, vocab, softcap):
    """tanh(z / softcap) and exp of the capped logits, (C, V) float32; the padding's exp is 0."""
    z = jnp.einsum("cd,vd->cv", x, head, preferred_element_type=jnp.float32)
    t = jnp.tanh(z / softcap)
    e = jnp.exp(softcap * t)  # no maximum to subtract: |logit| <= softcap, so the sum stays far below overflow
    if vocab < head.shape[0]:
        e = jnp.where(jnp.arange(head.shape[0]) < vocab, e, 0.0)
    return t, e


def _chunk_loss(x, head, targets, vocab, softcap):
    t, e = _capped(x, head, vocab, softcap)
    total = e.sum(axis=-1)
    capped = softcap * jnp.take_along_axis(t, targets[:, None], axis=1)[:, 0]
    return t, e, total, jnp.log(total) - capped


def _split(array, chunk):
    """(M, ...) -> (M / chunk, chunk, ...), the end padded with zeros."""
    pad = -array.shape[0] % chunk
    array = jnp.pad(array, [(0, pad)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(-1, chunk, *array.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _weighted_sum(hidden, head, targets, weights, vocab, softcap, chunk):
    def body(total, xs):
        x, y, w = xs
        nll = _chunk_loss(x, head, y, vocab, softcap)[-1]
        return total + (w * nll).sum(), None

    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights))
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def _weighted_sum_fwd(hidden, head, targets, weights, vocab, softcap, chunk):
    def body(carry, xs):
        total, d_head = carry
        x, y, w = xs
        t, e, s, nll = _chunk_loss(x, head, y, vocab, softcap)
        hit = jnp.arange(head.shape[0]) == y[:, None]
        dz = (e * (w / s)[:, None] - jnp.where(hit, w[:, None], 0.0)) * (1.0 - t * t)
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("cv,vd->cd", dz, head)
        d_head = d_head + jnp.einsum("cd,cv->dv", x, dz, preferred_element_type=jnp.float32)
        return (total + (w * nll).sum(), d_head), dx

    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights))
    # (D, V): on a CPU the product with the vocabulary as its last axis is a third faster than its transpose
    start = (jnp.float32(0), jnp.zeros(head.shape[::-1], jnp.float32))
    (total, d_head), dx = jax.lax.scan(body, start, chunks)
    return total, (dx.reshape(-1, hidden.shape[-1])[: hidden.shape[0]], d_head.T.astype(head.dtype))


def _weighted_sum_bwd(vocab, softcap, chunk, kept, g):
    d_hidden, d_head = kept
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_head).astype(d_head.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def weighted_nll(hidden, head, targets, weights, *, vocab: int, softcap: float, chunk: int = CHUNK) -> jax.Array:
    """sum_t weights_t * -log p(targets_t), a float32 scalar; differentiable in hidden and head only.

    hidden (..., D) and head (padded V, D) in one dtype; targets (...) int32, any negative one is ignored;
    weights (...) float32. Softmax over the first `vocab` entries of softcap * tanh(z / softcap).
    """
    targets, weights = targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    weights = jnp.where(targets >= 0, weights, 0.0)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(chunk, hidden.shape[0])
    return _weighted_sum(hidden, head, jnp.maximum(targets, 0), weights, vocab, softcap, chunk)


def token_nll(hidden, head, targets, *, vocab: int, softcap: float, chunk: int = CHUNK):
    """Per token: -log p(target) float32 (0 where the target is negative) and the most likely id, shaped as targets.

    No gradient: for evaluation. The chunk bounds the memory as in `weighted_nll`.
    """
    shape, targets = targets.shape, targets.reshape(-1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(chunk, flat.shape[0])

    def body(_, xs):
        x, y = xs
        t, _, _, nll = _chunk_loss(x, head, jnp.maximum(y, 0), vocab, softcap)
        return None, (jnp.where(y >= 0, nll, 0.0), t[:, :vocab].argmax(axis=-1).astype(jnp.int32))

    _, (nll, best) = jax.lax.scan(body, None, (_split(flat, chunk), _split(targets, chunk)))
    return tuple(a.reshape(-1)[: targets.shape[0]].reshape(shape) for a in (nll, best))

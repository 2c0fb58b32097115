"""Softcapped cross-entropy in chunks of tokens, with its own gradient.

The logits of a whole batch are the largest array of a small model: 8 x 2048 tokens x 32768 entries in float32 are 2 GB.
Here a scan holds those of one chunk at a time and computes the gradients from them as well: only d loss / d hidden and
d loss / d head are kept for the backward pass, and nothing is computed twice.

With c = softcap, t = tanh(z / c), e = exp(c t) and s the sum of e over the vocabulary,

    d nll / d z_v = (1 - t_v^2) e_v / s  -  [v = y] (1 - t_y^2).

The target y is left out of the products and has its own term, (1 - t_y^2) (s - e_y) / s, in float32: for a token that
the model is sure of it is the small difference of two numbers near one. What remains is u / s with u = (1 - t^2) e, and
as u does not depend on s, each block of the vocabulary is finished while it is in the cache.

A sample of the vocabulary may stand for all of it (Bengio and Senecal 2003): the batch's own targets, which in text are
most of s, and of the others some at random, each for as many as it was drawn from. Its s is right in the mean.

The loss is a weighted sum over tokens, so that one function serves pretraining (weight 1 / n), SFT (the mask) and the
policy gradient of RL (the advantage).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax import devices
from nanochat_jax.kernels import cross_entropy, fp8
from nanochat_jax.kernels.products import transposed
from nanochat_jax.kernels.segments import add_rows

CHUNK = 512  # tokens on a CPU
# large, as every chunk reads and writes the head's whole gradient, V x D in float32, and as the product for dx has only
# C x D elements to share out; half of it where the logits are in float32, for their size
GPU_CHUNK = 8192
GPU_TILE = 128  # rows of a product's tile on a GPU: chunks are rounded up to it
CPU_BLOCK = 4096  # entries of the vocabulary; a chunk's logits of one block are 8 MB, which the last-level cache holds


def _chunk(tokens: int, chunk: int | None, logits=jnp.float32) -> int:
    """`chunk`, or what suits the device and the logits' type: at most `tokens`, and on a GPU equal chunks."""
    if chunk or devices.platform() == "cpu":
        return min(chunk or CHUNK, tokens)
    most = GPU_CHUNK if jnp.dtype(logits).itemsize < 4 else GPU_CHUNK // 2
    even = -(-tokens // -(-tokens // most))
    return min(even + -even % GPU_TILE, tokens)


def _by_kernels() -> bool:
    return devices.platform() == "gpu" and not devices.partitioned()


def _cap(z, softcap):
    """tanh(z / softcap), and exp of the capped logits."""
    t = jnp.tanh(z / softcap)
    return t, jnp.exp(softcap * t)  # no maximum to subtract: |logit| <= softcap, so the sum stays far below overflow


def _capped(x, head, softcap):
    """`_cap` of the logits, (C, V) float32."""
    return _cap(jnp.einsum("cd,vd->cv", x, head, preferred_element_type=jnp.float32), softcap)


class Finished(NamedTuple):
    """What is known of a chunk once the sums of e are."""

    nll: jax.Array  # weighted and summed over the chunk
    w_s: jax.Array  # (C,) weight / s
    d_y: jax.Array  # (C,) d loss / d logit of the target
    rows: jax.Array  # (C, D) of the head, the targets'


def _finish(x, head, targets, w, softcap, rest) -> Finished:
    """rest (C,): the sums of e without the targets."""
    rows = head[targets]
    t_y, e_y = _cap(jnp.einsum("cd,cd->c", x, rows, preferred_element_type=jnp.float32), softcap)
    s = rest + e_y
    nll = (w * (jnp.log(s) - softcap * t_y)).sum()
    return Finished(nll, w / s, -w * (1.0 - t_y * t_y) * rest / s, rows)


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


# ------------------------------------------------------------------------------------ the gradients of a chunk
#
# Each method below gives (d loss / d head before the first chunk, add_chunk, how that gradient becomes (V, D)), with
# add_chunk(d_head, x (C, D), targets (C,), finish) -> d_head, d loss / dx but for the target's term, finish(rest).


def _blocks(head, vocab, softcap, counts=None):
    """One block of the vocabulary after another; takes x transposed as well, (D, C). counts (V,): how many entries each
    stands for."""
    V = head.shape[0]
    block = CPU_BLOCK if devices.platform() == "cpu" else V
    blocks = [slice(start, min(start + block, V)) for start in range(0, V, block)]

    def add_chunk(d_head, x, y, finish, xt):
        rest, dx, us = jnp.zeros(y.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32), []
        for entries in blocks:
            t, e = _capped(x, head[entries], softcap)
            e = jnp.where(_others(entries, y, vocab), e if counts is None else e * counts[entries], 0.0)
            u = (e * (1.0 - t * t)).astype(x.dtype)
            rest = rest + e.sum(axis=-1)
            dx = dx + jnp.einsum("cv,vd->cd", u, head[entries], preferred_element_type=jnp.float32)
            us.append(u)
        done = finish(rest)
        # (D, C) @ (C, V): on a CPU a third faster than the same with V first, and than a product that transposes x
        xt = (xt * done.w_s).astype(x.dtype)
        d_head = [d + jnp.matmul(xt, u, preferred_element_type=jnp.float32) for d, u in zip(d_head, us, strict=True)]
        return d_head, dx * done.w_s[:, None], done

    start = [jnp.zeros((head.shape[1], b.stop - b.start), jnp.float32) for b in blocks]
    return start, add_chunk, lambda d_head: jnp.concatenate([transposed(d) for d in d_head])


def _kernel(head, vocab, softcap):
    """On a GPU: one kernel between the products, which pass it logits in x's own type."""

    def add_chunk(d_head, x, y, finish):
        u, rest = cross_entropy.terms(jnp.einsum("cd,vd->cv", x, head), y, vocab, softcap)
        done = finish(rest)
        weighted = (x * done.w_s[:, None]).astype(x.dtype)
        d_head = d_head + jnp.einsum("cv,cd->vd", u, weighted, preferred_element_type=jnp.float32)
        dx = jnp.einsum("cv,vd->cd", u, head, preferred_element_type=jnp.float32)
        return d_head, dx * done.w_s[:, None], done

    return jnp.zeros(head.shape, jnp.float32), add_chunk, lambda d_head: d_head


def _eight_bits(head, vocab, softcap):
    """By 8-bit products; the logits' gradient is scaled by its own largest element."""
    head8, whole = fp8.quantize(head), slice(0, head.shape[0])

    def add_chunk(d_head, x, y, finish):
        x8 = fp8.quantize(x)
        t, e = _cap(fp8.dot(x8, head8, (1, 1), jnp.float32), softcap)
        e = jnp.where(_others(whole, y, vocab), e, 0.0)
        u = e * (1.0 - t * t)
        done = finish(e.sum(axis=-1))
        largest = (u.max(axis=-1) * jnp.abs(done.w_s)).max()
        g8 = fp8.quantize(u.astype(x.dtype) * done.w_s[:, None], fp8.E5M2, largest)
        return d_head + fp8.dot(x8, g8, (0, 0), jnp.float32), fp8.dot(g8, head8, (1, 0), jnp.float32), done

    return jnp.zeros(head.shape[::-1], jnp.float32), add_chunk, transposed


def _eight_bit_kernels(head, vocab, softcap):
    """The same on a GPU: a kernel for the sums, which the gradient's scale needs, and one that rounds the gradient."""
    head8 = fp8.quantize(head)
    # a barrier, so that it is transposed once and not in every chunk
    head8_T = head8._replace(values=jax.lax.optimization_barrier(head8.values.T))

    def add_chunk(d_head, x, y, finish):
        x8 = fp8.quantize(x)
        z = fp8.dot(x8, head8, (1, 1), x.dtype)
        rest, most = cross_entropy.sums(z, y, vocab, softcap)
        done = finish(rest)
        scale = fp8.scale_of((most * jnp.abs(done.w_s)).max(), fp8.E5M2)
        g, g_T = cross_entropy.rounded(z, y, done.w_s / scale, vocab, softcap, fp8.E5M2)
        dx = fp8.dot(fp8.Quantized(g, scale), head8_T, (1, 1), jnp.float32)
        return d_head + fp8.dot(fp8.Quantized(g_T, scale), x8, (1, 0), jnp.float32), dx, done

    return jnp.zeros(head.shape, jnp.float32), add_chunk, lambda d_head: d_head


class Sample(NamedTuple):
    """Entries that stand for the whole vocabulary."""

    ids: jax.Array  # (S,) int32
    counts: jax.Array  # (S,) float32: how many entries each stands for


def draw_sample(targets, vocab: int, size: int) -> Sample:
    """`size` of the first `vocab` entries: the targets, or as many as fill half of it, and others at random. What is
    drawn depends on the targets alone; negative ones count as entry 0."""
    targets = jnp.maximum(targets, 0)
    random = jax.random.uniform(jax.random.fold_in(jax.random.key(0), targets.sum()), (vocab,))
    is_target = jnp.zeros(vocab, bool).at[targets].set(True)
    mine, others = (jax.lax.top_k(jnp.where(of, random, -1.0), size)[1] for of in (is_target, ~is_target))
    n = is_target.sum()
    kept = jnp.maximum(jnp.minimum(n, size // 2), size - (vocab - n))  # the rest of the slots must find others
    slots = jnp.arange(size)
    ids = jnp.where(slots < kept, mine, others[slots - kept])
    counts = jnp.where(slots < kept, n / kept, (vocab - n) / jnp.maximum(size - kept, 1))
    return Sample(ids, counts)


def sampler(vocab: int, size: int | None) -> Callable | None:
    """targets -> `Sample` of `size` entries; None where all of them are taken."""
    return functools.partial(draw_sample, vocab=vocab, size=size) if size and size < vocab else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _weighted_sum(hidden, head, targets, weights, drawn, vocab, softcap, chunk, eight_bits):
    return _weighted_sum_fwd(hidden, head, targets, weights, drawn, vocab, softcap, chunk, eight_bits)[0]


def _weighted_sum_fwd(hidden, head, targets, weights, drawn, vocab, softcap, chunk, eight_bits):
    size, places = vocab, targets  # of the entries that are multiplied, and of the targets in them
    if drawn:
        method, size = functools.partial(_blocks, counts=drawn.counts), len(drawn.ids)
        places = jnp.full(len(head), size, jnp.int32).at[drawn.ids].set(jnp.arange(size, dtype=jnp.int32))[targets]
    elif _by_kernels():
        method = _eight_bit_kernels if eight_bits else _kernel
    else:
        method = _eight_bits if eight_bits else _blocks
    start, add_chunk, joined = method(head[drawn.ids] if drawn else head, size, softcap)

    def body(carry, xs):
        (total, d_head), (x, y, w, place, *xt) = carry, xs
        d_head, dx, done = add_chunk(d_head, x, place, functools.partial(_finish, x, head, y, w, softcap), *xt)
        dx = dx + done.d_y[:, None] * done.rows
        return (total + done.nll, d_head), (dx.astype(x.dtype), done.d_y)

    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights, places))
    if drawn or method is _blocks:
        chunks = (*chunks, chunks[0].transpose(0, 2, 1))
    (total, d_head), (dx, d_y) = jax.lax.scan(body, (jnp.float32(0), start), chunks)
    n, d_head = hidden.shape[0], joined(d_head)
    if drawn:
        d_head = jnp.zeros(head.shape, jnp.float32).at[drawn.ids].set(d_head, unique_indices=True)
    d_head = add_rows(d_head, hidden, targets, d_y.reshape(-1)[:n])
    return total, (dx.reshape(-1, hidden.shape[-1])[:n], d_head.astype(head.dtype))


def _weighted_sum_bwd(vocab, softcap, chunk, eight_bits, kept, g):
    d_hidden, d_head = kept
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_head).astype(d_head.dtype), None, None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def tempered(hidden, softcap: float, temperature: float):
    """hidden (..., D) and softcap with which the losses here are of the softmax at a temperature T.

    The logits over T are c tanh((z / T) / c) with c = softcap / T; exp(c) must stay well within float32.
    """
    return (hidden, softcap) if temperature == 1 else (hidden / temperature, softcap / temperature)


@jax.named_scope("loss")
def weighted_nll(
    hidden,
    head,
    targets,
    weights,
    *,
    vocab: int,
    softcap: float,
    chunk: int | None = None,
    eight_bits: bool = False,
    drawn: Sample | None = None,
) -> jax.Array:
    """sum_t weights_t * -log p(targets_t), a float32 scalar; differentiable in hidden and head only. It always computes
    the gradients; `token_nll` is for evaluation.

    hidden (..., D) and head (padded V, D) in one dtype; targets (...) int32, any negative one is ignored;
    weights (...) float32. Softmax over the first `vocab` entries of softcap * tanh(z / softcap).
    eight_bits: products in 8-bit floats (kernels/fp8.py), but for the target's own term. drawn: entries that
    stand for the vocabulary; their products are in the type of `head`.
    """
    targets, weights = targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    weights = jnp.where(targets >= 0, weights, 0.0)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chunk = _chunk(hidden.shape[0], chunk, hidden.dtype if _by_kernels() and not drawn else jnp.float32)
    return _weighted_sum(hidden, head, jnp.maximum(targets, 0), weights, drawn, vocab, softcap, chunk, eight_bits)


def token_nll(hidden, head, targets, *, vocab: int, softcap: float, chunk: int | None = None, entropy: bool = False):
    """Per token: -log p(target) float32 (0 where the target is negative) and the most likely id, shaped as targets.

    entropy: a third array, the entropy of the whole distribution in nats. No gradient: for evaluation, and for the
    weights of tokens in RL. Chunks bound the memory as in `weighted_nll`.
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

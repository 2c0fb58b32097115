"""One token from logits: temperature, top-k, top-p and a seed, each of them per row.

What a row draws depends on its logits, its settings, its seed and its position alone: not on what else is in the
batch, nor on how the batch is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CANDIDATES = (0, 64, 256)  # how many of the likeliest tokens are looked at; beyond these: the whole vocabulary


class Settings(NamedTuple):
    """Arrays (S,), one entry per row."""

    temperature: jax.Array  # float32; 0: the likeliest token
    top_k: jax.Array  # int32; 0: all
    top_p: jax.Array  # float32 in (0, 1]; nucleus sampling, arXiv 1904.09751
    seed: jax.Array  # uint32


def mode(rows, vocab: int) -> tuple[bool, int]:
    """(all rows are greedy, candidates) for requests: the cheapest way to draw for all of them. Static under jit."""
    drawn = [r for r in rows if r.temperature > 0]
    need = 0
    for r in drawn:
        if r.top_p < 1 and not r.top_k:
            need = vocab
        need = max(need, r.top_k)
    return not drawn, next((c for c in CANDIDATES if need <= c < vocab), vocab)


def sample(logits: jax.Array, settings: Settings, position: jax.Array, how: tuple[bool, int]) -> jax.Array:
    """logits (S, V) float32, position (S,) int32 -> ids (S,) int32. `how` is `mode` of these rows."""
    greedy, candidates = how
    best = logits.argmax(axis=-1).astype(jnp.int32)
    if greedy:
        return best
    keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(settings.seed, position)
    scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
    drawn = (scaled + noise).argmax(axis=-1).astype(jnp.int32)
    if candidates:
        filtered = (settings.top_k > 0) | (settings.top_p < 1)
        drawn = jnp.where(filtered, _from_the_top(scaled, settings, keys, candidates), drawn)
    return jnp.where(settings.temperature > 0, drawn, best)


def _from_the_top(scaled, settings: Settings, keys, candidates: int):
    """Draws from the top_k likeliest, of these from the fewest whose probability reaches top_p."""
    values, ids = jax.lax.top_k(scaled, candidates)  # descending
    k = jnp.where(settings.top_k > 0, settings.top_k, candidates)[:, None]
    kept = jnp.arange(candidates) < k
    probs = jax.nn.softmax(jnp.where(kept, values, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    probs = jnp.where(before < settings.top_p[:, None], probs, 0.0)
    cumulative = jnp.cumsum(probs, axis=-1)
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)[:, None]
    # the first place where the cumulative probability passes u; places of probability 0 are never it
    place = jnp.argmax(cumulative > u * cumulative[:, -1:], axis=-1)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0].astype(jnp.int32)

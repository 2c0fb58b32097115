"""The key/value cache: slots on every device, rings where a layer sees a window only.

A layer keeps `ring` positions of a slot: position p lives at place p mod ring. A layer that sees everything has a place
for each position of the context, and what is said here holds for it too. A ring is SLACK places longer than the window,
so that a chunk of prefill, or tokens that were decoded and then thrown away, overwrite nothing that is still seen:
after positions up to `written` were filled, a sequence may go on from any position p >= written - SLACK.

Shapes: D devices that split the slots, S slots of each, M rows of a call on each, K key/value heads, R places of a
ring, N head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from nanochat_jax import sharding

SLACK = 256  # the longest chunk of prefill, and the most that a sequence may be set back

Cache = list[tuple[jax.Array, jax.Array]]  # per layer keys and values, (D, S, K, R, N); of some rows (D * M, K, R, N)


def ring_sizes(cfg, max_len: int) -> list[int]:
    """Places per layer."""
    return [min(max_len, window + SLACK) for window in cfg.windows]


def make_cache(cfg, devices: int, slots: int, max_len: int, dtype, mesh=None) -> Cache:
    """Zeros; the first axis is split over the data axes of the mesh where there are several devices."""

    def zeros():
        shapes = [(devices, slots, cfg.n_kv_head, ring, cfg.head_dim) for ring in ring_sizes(cfg, max_len)]
        return [(jnp.zeros(s, dtype), jnp.zeros(s, dtype)) for s in shapes]

    return jax.jit(zeros, out_shardings=sharding.rows(mesh) if devices > 1 else None)()


def take(cache: Cache, slots: jax.Array | None, span: int) -> Cache:
    """The rows of `slots` (D, M), None for all of them, rings cut at `span` places: (D * M, K, min(R, span), N)."""

    def rows(c):
        if slots is None:
            found = c[:, :, :, :span]
        else:
            found = jax.vmap(lambda c, s: c[s, :, :span])(c, jnp.minimum(slots, c.shape[1] - 1))
        return found.reshape(-1, *found.shape[2:])

    return jax.tree.map(rows, cache)


def put(cache: Cache, slots: jax.Array | None, rows: Cache) -> Cache:
    """The cache with `rows`, as `take` gave them, in `slots`; a slot out of range is not written."""

    def write(c, new):
        if slots is None:
            return jax.lax.dynamic_update_slice(c, new.reshape(*c.shape[:2], *new.shape[1:]), (0,) * 5)
        new = new.reshape(*slots.shape, *new.shape[1:])
        return jax.vmap(lambda c, s, n: c.at[s, :, : n.shape[2]].set(n, mode="drop"))(c, slots, new)

    return jax.tree.map(write, cache, rows)


@functools.partial(jax.jit, donate_argnums=0)
def copy(cache: Cache, source: jax.Array, to: jax.Array) -> Cache:
    """The cache with slots `source` (D, M) of each device in its slots `to` as well."""
    return put(cache, to, take(cache, source, max(keys.shape[3] for keys, _ in cache)))


def append(kept: jax.Array, new: jax.Array, positions: jax.Array, ring: int) -> jax.Array:
    """kept (M, K, R, N) with new (M, T, K, N) at positions (M, T); a negative position is not written.

    `ring` is the layer's own, which is more than R where the rows were cut at a span.
    """
    place = jnp.where(positions >= 0, positions % ring, ring)
    return kept.at[jnp.arange(kept.shape[0])[:, None], :, place].set(new, mode="drop")


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, newest, window: int, ring: int):
    """Queries q (M, T, H, N) at positions (M, T) against keys and values (M, K, R, N) -> (M, T, H, N).

    newest (M,) is the newest position in the cache. What lies beyond it, or out of the window, is not seen.
    """
    M, T, H, N = q.shape
    K, places = keys.shape[1], jnp.arange(keys.shape[2])
    q = (q * N**-0.5).reshape(M, T, K, H // K, N).transpose(0, 2, 3, 1, 4).reshape(M, K, H // K * T, N)
    scores = jnp.einsum("mktn,mkrn->mktr", q, keys, preferred_element_type=jnp.float32)
    held = newest[:, None] - (newest[:, None] - places) % ring  # the position at each place; negative: none
    distance = positions[:, :, None] - held[:, None, :]
    seen = (distance >= 0) & (distance <= window) & (held >= 0)[:, None, :]  # (M, T, R)
    scores = scores.reshape(M, K, H // K, T, -1)
    probs = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1).astype(values.dtype)
    out = jnp.einsum("mktr,mkrn->mktn", probs.reshape(M, K, H // K * T, -1), values)
    return out.reshape(M, K, H // K, T, N).transpose(0, 3, 1, 2, 4).reshape(M, T, H, N)

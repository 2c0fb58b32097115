"""The key/value cache: slots on every device, rings where a layer sees a window only.

A layer keeps `ring` positions of a slot: position p is at place p mod ring. The ring of a layer without a window has a
place for every position of the context. Others are SLACK places longer than the window, so that a chunk of prefill, or
tokens that were decoded and then thrown away, overwrite nothing that is still visible: after positions up to `written`
were filled, a sequence may continue from any position p >= written - SLACK.

Shapes: D devices that split the slots, S slots of each, M rows of a call on each, K key/value heads, R places of a
ring, N head size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from nanochat_jax.mesh import sharding
from nanochat_jax.model.attention import is_offset

SLACK = 256  # the longest chunk of prefill, and the most that a sequence may be rolled back


@dataclass(eq=False)
class Slot:
    """What a row of the cache holds; compared by identity."""

    device: int
    place: int  # among the slots of its device
    ids: list[int] = field(default_factory=list)  # the sequence whose keys and values it holds
    written: int = 0  # positions that were ever filled for it, thrown away ones included
    last_used: int = 0  # counted in requests

    def reusable(self, prompt: Sequence[int], safe: int) -> int:
        """How many ids of `prompt` it holds, if a sequence may continue from there; else 0.

        safe: the shortest ring: up to so many positions have overwritten nothing.
        """
        n = common_prefix(self.ids, prompt)
        return n if self.written <= safe or n >= self.written - SLACK else 0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


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


def put(cache: Cache, slots: jax.Array | None, rows: Cache, positions: jax.Array) -> Cache:
    """The cache with what `rows`, as `take` gave them, hold at positions (D * M, T), -1 for none.

    A slot out of range is not written. Only new positions are copied, except where the rows are the whole cache.
    """
    M = cache[0][0].shape[1] if slots is None else slots.shape[1]
    at = jnp.arange(M)[None] if slots is None else slots

    def write(c, new):
        ring = c.shape[3]
        if slots is None and new.shape[2] == ring:
            return new.reshape(c.shape)
        place = jnp.where(positions >= 0, positions % ring, ring)
        found = jnp.take_along_axis(new, jnp.minimum(place, new.shape[2] - 1)[:, None, :, None], axis=2)
        found, place = (x.reshape(-1, M, *x.shape[1:]) for x in (found, place))  # (D, M, K, T, N), (D, M, T)

        def one(c, s, p, f):
            return c.at[s[:, None], :, p].set(f.transpose(0, 2, 1, 3), mode="drop")

        return jax.vmap(one)(c, jnp.broadcast_to(at, (c.shape[0], M)), place, found)

    return jax.tree.map(write, cache, rows)


@functools.partial(jax.jit, donate_argnums=0)
def copy(cache: Cache, source: jax.Array, to: jax.Array) -> Cache:
    """The cache with slots `source` (D, M) of each device copied to its slots `to`; out of range: none."""

    found = jax.vmap(lambda c, s: c[jnp.minimum(s, c.shape[0] - 1)])
    rows = jax.tree.map(lambda c: found(c, source), cache)
    cache, rows = jax.lax.optimization_barrier((cache, rows))  # all is read before anything is written: in place
    return jax.tree.map(jax.vmap(lambda c, r, t: c.at[t].set(r, mode="drop")), cache, rows, [(to, to)] * len(cache))


def append(kept: jax.Array, new: jax.Array, positions: jax.Array, ring: int) -> jax.Array:
    """kept (M, K, R, N) with new (M, T, K, N) at positions (M, T); a negative position is not written.

    `ring` is the layer's own, which is more than R where the rows were cut at a span.
    """
    M, K, R, N = kept.shape
    place = jnp.where(positions >= 0, positions % ring, ring)
    # (M, K) as one axis: the indexed axes then lead, and XLA writes in place without a transposed copy
    flat, rows = kept.reshape(M * K, R, N), jnp.arange(M * K)[:, None]
    new = new.transpose(0, 2, 1, 3).reshape(M * K, -1, N)
    return flat.at[rows, jnp.repeat(place, K, axis=0)].set(new, mode="drop").reshape(kept.shape)


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, newest, window: int, ring: int, offset=False
):
    """Queries q (M, T, H, N) at positions (M, T) against keys and values (M, K, R, N) -> (M, T, H, N).

    newest (M,) is the newest position in the cache. Positions after it or outside the window are masked. offset: half
    of each key is that of the place before, as in `attention.offset_keys`.
    """
    M, T, H, N = q.shape
    K, places = keys.shape[1], jnp.arange(keys.shape[2])
    q = (q * N**-0.5).reshape(M, T, K, H // K, N).transpose(0, 2, 3, 1, 4).reshape(M, K, H // K * T, N)
    if offset:  # the cache's keys are read once for both halves
        q = jnp.concatenate([jnp.where(is_offset(N), 0, q), jnp.where(is_offset(N), q, 0)], axis=2)
    scores = jnp.einsum("mktn,mkrn->mktr", q, keys, preferred_element_type=jnp.float32)
    held = newest[:, None] - (newest[:, None] - places) % ring  # the position at each place; negative: none
    distance = positions[:, :, None] - held[:, None, :]
    seen = (distance >= 0) & (distance <= window) & (held >= 0)[:, None, :]  # (M, T, R)
    if offset:  # a place's score takes its other half from the place before
        scores, before = jnp.split(scores, 2, axis=2)
        scores += jnp.where((held > 0)[:, None, None], jnp.roll(before, 1, axis=-1), 0.0)
    scores = scores.reshape(M, K, H // K, T, -1)
    probs = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1).astype(values.dtype)
    out = jnp.einsum("mktr,mkrn->mktn", probs.reshape(M, K, H // K * T, -1), values)
    return out.reshape(M, K, H // K, T, N).transpose(0, 3, 1, 2, 4).reshape(M, T, H, N)

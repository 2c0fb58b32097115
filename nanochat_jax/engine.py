"""The engine: prompts in, tokens out, many at a time, through a key/value cache.

A small operating system. A slot of the cache is a process's memory; the queue is what waits for one; `step` is a time
slice: it admits prompts to free slots (prefill), then decodes CHUNK tokens for every slot in one call to the device.
The engine knows ids only: text, tools and HTTP are the callers'. A tool is a state machine that sees each token and may
answer with tokens to force; what was decoded past that point in the slice is thrown away, which costs nothing but its
time: the cache is addressed by position, and those positions are written again.

    engine = Engine(model, slots=8, max_len=model.cfg.sequence_len)
    [completion] = engine.generate([Request(ids, max_new_tokens=100, temperature=0.0, stop_ids=(end,))])

Shapes: S slots, L cache length, K key/value heads, G query heads to each, N head size.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax import sharding
from nanochat_jax.attention import causal_attention
from nanochat_jax.model import cast_matrices, merge
from nanochat_jax.sampling import Settings, mode, sample

CHUNK = 8  # tokens per row and call: the device is asked, and the host looks, once in so many
SHORTEST = 64  # prompts are padded to this, or a power of two times it
PREFILL_TOKENS = 8192  # rows times padded length of one prefill call, at most


@dataclass(frozen=True)
class Request:
    """What to continue, and how. top_k 0 is all of them; temperature 0 is greedy."""

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass
class Completion:
    ids: list[int] = field(default_factory=list)  # without the stop token
    mask: list[int] = field(default_factory=list)  # 0 where a tool forced the token, as long as ids
    finish_reason: str = ""  # stop | length | cancelled


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine; compared by identity."""

    request: Request
    tool: object | None
    completion: Completion = field(default_factory=Completion)
    forced: deque = field(default_factory=deque)  # tokens that a tool wants next
    slot: int | None = None

    @property
    def length(self) -> int:
        return len(self.request.ids) + len(self.completion.ids)

    def last(self, n: int) -> int:
        """The id at place -n of prompt and completion, or -1 where there is none."""
        if n <= len(self.completion.ids):
            return self.completion.ids[-n]
        n -= len(self.completion.ids)
        return self.request.ids[-n] if n <= len(self.request.ids) else -1


@dataclass(frozen=True)
class Event:
    """What one step did for a ticket: its new ids, and the completion if that was the end."""

    ticket: Ticket
    ids: list[int]
    completion: Completion | None


# --------------------------------------------------------------------------------------------- on the device


def _padded(n: int, smallest: int, largest: int) -> int:
    """n rounded up to smallest times a power of two, at most largest: few shapes, few compilations."""
    size = smallest
    while size < n:
        size *= 2
    return min(size, largest)


def make_cache(cfg, slots: int, max_len: int, dtype, mesh=None) -> list:
    """[(keys, values)] per layer, each (S, K, L, N) zeros; slots are split over the mesh where it divides them."""
    shape = (slots, cfg.n_kv_head, max_len, cfg.head_dim)

    def zeros():
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(cfg.n_layer)]

    split = mesh is not None and slots % sharding.data_parallel(mesh) == 0
    return jax.jit(zeros, out_shardings=sharding.rows(mesh) if split else None)()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graph, params, cache, tokens, source, slots):
    """Writes keys and values of prompts tokens (R, T), from position 0, into the cache: row source[i] to slots[i].

    source and slots (M,); a slot out of range is not written. What stands beyond a prompt's end is never attended to.
    """
    model, made = merge(graph, params), []

    def attend(layer, q, k, v):
        made.append((k, v))
        window = model.cfg.windows[layer]
        return causal_attention(q, k, v, window if window < model.cfg.sequence_len else None)

    T = tokens.shape[1]
    model.trunk(tokens, jnp.arange(T), attend)
    return [
        tuple(c.at[slots, :, :T].set(new.transpose(0, 2, 1, 3)[source], mode="drop") for c, new in zip(pair, kv))
        for pair, kv in zip(cache, made)
    ]


def _attend_to_cache(cfg, cache: list, position, layer, q, k, v):
    """One query per slot, q (S, 1, H, N), against its cache, k and v (S, 1, K, N) written at `position` (S,) first."""
    S, _, H, N = q.shape
    rows, K = jnp.arange(S), k.shape[2]
    keys, values = (c.at[rows, :, position].set(x[:, 0], mode="drop") for c, x in zip(cache[layer], (k, v)))
    cache[layer] = (keys, values)
    scores = jnp.einsum("skgn,skln->skgl", q.reshape(S, K, H // K, N), keys, preferred_element_type=jnp.float32)
    distance = position[:, None] - jnp.arange(keys.shape[2])
    seen = (distance >= 0) & (distance <= cfg.windows[layer])
    probs = jax.nn.softmax(jnp.where(seen[:, None, None], scores * N**-0.5, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("skgl,skln->skgn", probs, values).reshape(S, 1, H, N)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(graph, span, how, params, cache, last, position, forced, settings: Settings):
    """Tokens (S, n), and the cache with them in it.

    last (S, 2) the two newest ids of each slot (-1 for none), position (S,) that of the newest, whose keys are not in
    the cache yet; forced (S, n) ids to take in place of a sample, -1 for none. span: positions that any row reaches.
    """
    model = merge(graph, params)

    def one(carry, wanted):
        cache, before, token, position = carry
        cache = list(cache)
        hidden = model.trunk(
            token[:, None],
            position[:, None],
            lambda i, q, k, v: _attend_to_cache(model.cfg, cache, position, i, q, k, v),
            prev_tokens=before,
        )
        drawn = sample(model.logits(hidden[:, 0]), settings, position, how)
        new = jnp.where(wanted >= 0, wanted, drawn)
        return (cache, token, new, position + 1), new

    # The slice is copied once a call, so that every step reads only what is in use.
    short = jax.tree.map(lambda c: c[:, :, :span], cache)
    (short, *_), tokens = jax.lax.scan(one, (short, last[:, 0], last[:, 1], position), forced.T)
    cache = jax.tree.map(lambda c, s: jax.lax.dynamic_update_slice(c, s, (0, 0, 0, 0)), cache, short)
    return tokens.T, cache


# ----------------------------------------------------------------------------------------------- on the host


class Engine:
    """`slots` rows of at most `max_len` tokens each. One thread at a time may use it.

    tool: has start(), which gives a state machine with push(id) -> ids to force; None for none.
    """

    def __init__(self, model, *, slots: int, max_len: int, tool=None, mesh=None):
        if max_len > model.cfg.sequence_len:
            raise ValueError(f"max_len={max_len} is more than the model's context of {model.cfg.sequence_len}")
        self.slots, self.max_len, self.cfg, self._tool = slots, max_len, model.cfg, tool
        self._graph, state = nnx.split(model)
        self._dtype = model.dtype
        self.update_params(nnx.to_pure_dict(state))
        self._cache = make_cache(self.cfg, slots, max_len, model.dtype, mesh)
        self._queue: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # slot -> ticket
        self._cancelled: list[Ticket] = []

    def update_params(self, params: dict) -> None:
        """Goes on with other parameters, a nested dict; matrices are cast to the model's dtype once, here."""
        self._params = jax.jit(cast_matrices, static_argnums=1)(params, self._dtype)

    # ---------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> Ticket:
        """Queues a request. ValueError where its prompt is empty or leaves no room for a token."""
        if not 1 <= len(request.ids) < self.max_len:
            raise ValueError(f"a prompt of {len(request.ids)} tokens does not fit: 1 to {self.max_len - 1}")
        if request.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        ticket = Ticket(request, self._tool.start() if self._tool else None)
        self._queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request, wherever it is; the next step says so. Nothing where it has ended already."""
        if ticket in self._queue:
            self._queue.remove(ticket)
        elif ticket.slot is not None:
            del self._running[ticket.slot]
            ticket.slot = None
        else:
            return
        ticket.completion.finish_reason = "cancelled"
        self._cancelled.append(ticket)

    @property
    def busy(self) -> bool:
        """Something is queued, running, or yet to be reported."""
        return bool(self._queue or self._running or self._cancelled)

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All of them to their end, in order."""
        tickets = [self.submit(r) for r in requests]
        while self.busy:
            self.step()
        return [t.completion for t in tickets]

    # ------------------------------------------------------------------------------------------- a time slice

    def step(self) -> list[Event]:
        """Admits what is queued while slots are free, decodes a slice for all rows, and says what came of it."""
        events = [Event(t, [], t.completion) for t in self._cancelled]
        self._cancelled.clear()
        self._admit()
        if self._running:
            tokens = self._slice()
            for slot, ticket in list(self._running.items()):
                new = self._take(ticket, tokens[slot])
                done = bool(ticket.completion.finish_reason)
                if done:
                    del self._running[slot]
                    ticket.slot = None
                events.append(Event(ticket, new, ticket.completion if done else None))
        return events

    def _admit(self) -> None:
        free = [s for s in range(self.slots) if s not in self._running]
        by_prompt: dict[tuple[int, ...], list[Ticket]] = {}
        while free and self._queue:
            ticket = self._queue.popleft()
            ticket.slot = free.pop(0)
            self._running[ticket.slot] = ticket
            # The last id is not prefilled: it is what the first decode step takes in.
            by_prompt.setdefault(tuple(ticket.request.ids[:-1]), []).append(ticket)
        by_length: dict[int, list] = {}
        for prompt, tickets in by_prompt.items():
            if prompt:
                by_length.setdefault(_padded(len(prompt), SHORTEST, self.max_len), []).append((prompt, tickets))
        for length, group in by_length.items():
            rows = max(1, PREFILL_TOKENS // length)
            for at in range(0, len(group), rows):
                self._prefill_group(length, group[at : at + rows])

    def _prefill_group(self, length: int, group: list[tuple[tuple[int, ...], list[Ticket]]]) -> None:
        """Prompts of one padded length; one that several tickets share is computed once."""
        tokens = np.zeros((_padded(len(group), 1, 1 << 30), length), np.int32)
        places = [(r, t.slot) for r, (_, tickets) in enumerate(group) for t in tickets]
        spare = _padded(len(places), 1, 1 << 30) - len(places)
        source, slots = np.asarray(places + [(0, self.slots)] * spare, np.int32).T
        for r, (prompt, _) in enumerate(group):
            tokens[r, : len(prompt)] = prompt
        self._cache = _prefill(self._graph, self._params, self._cache, tokens, source, slots)

    def _slice(self) -> np.ndarray:
        """(S, CHUNK) the next tokens of every slot; those of free slots mean nothing."""
        rows = self._running.items()
        last, position = np.full((self.slots, 2), -1, np.int32), np.zeros(self.slots, np.int32)
        forced = np.full((self.slots, CHUNK), -1, np.int32)
        settings = Settings(
            np.zeros(self.slots, np.float32),
            np.zeros(self.slots, np.int32),
            np.ones(self.slots, np.float32),
            np.zeros(self.slots, np.uint32),
        )
        last[:, 1] = 0
        for slot, ticket in rows:
            r = ticket.request
            last[slot] = ticket.last(2), ticket.last(1)
            position[slot] = ticket.length - 1
            ahead = list(ticket.forced)[:CHUNK]
            forced[slot, : len(ahead)] = ahead
            for array, value in zip(settings, (r.temperature, r.top_k, r.top_p, r.seed % 2**32)):
                array[slot] = value
        span = _padded(int(position.max()) + CHUNK, 2 * SHORTEST, self.max_len)
        how = mode([t.request for _, t in rows], self.cfg.vocab_size)
        tokens, self._cache = _decode(
            self._graph, span, how, self._params, self._cache, last, position, forced, settings
        )
        return np.asarray(tokens)

    def _take(self, ticket: Ticket, tokens: np.ndarray) -> list[int]:
        """Moves a ticket on by what was decoded for it, up to its end or to where a tool wants other tokens."""
        out, request, first = ticket.completion, ticket.request, len(ticket.completion.ids)
        for id in tokens.tolist():
            is_forced = bool(ticket.forced)
            if is_forced:
                ticket.forced.popleft()
            elif id in request.stop_ids:
                out.finish_reason = "stop"
                break
            out.ids.append(id)
            out.mask.append(int(not is_forced))
            if len(out.ids) == request.max_new_tokens or ticket.length == self.max_len:
                out.finish_reason = "length"
                break
            wanted = ticket.tool.push(id) if ticket.tool and not is_forced else []
            if wanted:
                ticket.forced.extend(wanted)
                break
        return out.ids[first:]

"""Sampling one token from logits, with temperature, top-k, top-p and a seed for each row.

A row's sample depends on its logits, settings, seed and position only: not on what else is in the batch, nor on how
the batch is compiled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import devices

CANDIDATES = (0, 64, 256)  # how many of the likeliest tokens are sorted; above these: the whole vocabulary
COLDEST = 1e-6  # a temperature below it is 0
COMPARISONS = 2**24  # of `_by_rank`, at most
NOWHERE = 1 << 20  # beyond every slice
TOP_LOGPROBS = 20  # as many as OpenAI's API gives


@dataclass(frozen=True)
class Request:
    """What to continue, and how. top_k 0 is all of them; temperature 0 is greedy.

    logprobs: -1 for none, n for those of the chosen tokens and of the n likeliest at each place, at most TOP_LOGPROBS.
    """

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int = -1
    shaping: "Shaping | None" = None  # what is done to its logits before the draw
    tool: Any = None  # in place of the engine's: has start(), which gives a state machine as `tools.Tools`
    grammar: Any = None  # what its answer keeps to: has start(), which gives a state machine as `grammar.Form`

    @property
    def drawn(self) -> bool:
        return self.temperature >= COLDEST


@dataclass(frozen=True)
class Shaping:
    """presence and frequency are taken from the logits of tokens that the answer has, once and for each time;
    repetition divides positive logits of tokens that were read or said, and multiplies others (CTRL, arXiv 1909.05858);
    bias is added; what is less likely than min_p times the likeliest is not drawn (arXiv 2407.01082)."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    min_p: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()  # (id, what is added)


class TokenLogprob(NamedTuple):
    """Natural logarithms of the model's probabilities, before temperature and filters."""

    logprob: float  # of the token that was taken
    top: tuple[tuple[int, float], ...]  # (id, logprob) of the likeliest, in falling order


class Settings(NamedTuple):
    """Arrays (S,) of numpy or jax, one entry per row."""

    temperature: Any  # float32; 0: the likeliest token
    top_k: Any  # int32; 0: all
    top_p: Any  # float32 in (0, 1]; nucleus sampling, arXiv 1904.09751
    seed: Any  # uint32

    @classmethod
    def blank(cls, rows: int) -> Self:
        """Greedy rows, as numpy arrays to be filled in."""
        kinds = ((0, np.float32), (0, np.int32), (1, np.float32), (0, np.uint32))
        return cls(*(np.full(rows, value, dtype) for value, dtype in kinds))

    def fill(self, row: int, request: Request) -> None:
        self.temperature[row] = request.temperature if request.drawn else 0.0
        self.top_k[row], self.top_p[row], self.seed[row] = request.top_k, request.top_p, request.seed % 2**32


class Shaped(NamedTuple):
    """`Shaping` of rows (S,), and what it looks at (S, V). Numpy arrays to be filled in, or jax's."""

    presence: Any
    frequency: Any
    repetition: Any
    min_p: Any
    bias: Any
    said: Any  # int32: how often the answer has each token
    seen: Any  # bool: the prompt or the answer has it

    @classmethod
    def blank(cls, rows: int, vocab: int) -> Self:
        numbers = (np.full(rows, value, np.float32) for value in (0, 0, 1, 0))
        kinds = (np.float32, np.int32, bool)
        return cls(*numbers, *(np.zeros((rows, vocab), kind) for kind in kinds))

    def fill(self, row: int, wanted: Shaping, prompt: Sequence[int], answer: Sequence[int]) -> None:
        for name in ("presence", "frequency", "repetition", "min_p"):
            getattr(self, name)[row] = getattr(wanted, name)
        for id, value in wanted.bias:
            self.bias[row, id] = value
        self.seen[row, [*prompt, *answer]] = True
        np.add.at(self.said[row], answer, 1)

    def applied(self, logits: jax.Array, temperature: jax.Array) -> jax.Array:
        """logits (S, V) float32 as they are drawn from; -inf: never."""
        presence, frequency, repetition, min_p = (x[:, None] for x in self[:4])
        z = jnp.where(self.seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
        z = z - presence * (self.said > 0) - frequency * self.said + self.bias
        least = z.max(axis=-1, keepdims=True) + jnp.maximum(temperature, COLDEST)[:, None] * jnp.log(min_p)
        return jnp.where(z >= least, z, -jnp.inf)

    def taken(self, ids: jax.Array) -> Self:
        """After one more token (S,) of each row."""
        rows = jnp.arange(len(ids))
        return self._replace(said=self.said.at[rows, ids].add(1), seen=self.seen.at[rows, ids].set(True))


class Mode(NamedTuple):
    """What sampling some rows needs, so that the cheapest exact program is compiled for them. Static under jit."""

    greedy: bool  # a row takes the likeliest
    drawn: bool  # a row samples
    plain: bool  # a row samples from the whole distribution
    candidates: int  # how many of the likeliest the filtered rows need; 0: there is no filtered row
    logprobs: bool  # a row wants logprobs
    shaped: bool = False  # a row's logits are shaped
    formed: bool = False  # a row keeps to a grammar


def mode(requests: Sequence[Request], vocab: int) -> Mode:
    drawn = [r for r in requests if r.drawn]
    filtered = [r for r in drawn if r.top_k or r.top_p < 1]
    need = max((r.top_k or vocab for r in filtered), default=0)
    candidates = next((c for c in CANDIDATES if need <= c < vocab), vocab)
    logprobs = any(r.logprobs >= 0 for r in requests)
    shaped = any(r.shaping for r in requests)
    extras = logprobs, shaped, any(r.grammar for r in requests)
    return Mode(len(drawn) < len(requests), bool(drawn), len(filtered) < len(drawn), candidates, *extras)


class Chance(NamedTuple):
    """What rows draw with at one position."""

    keys: Any  # (S,), None where no row samples
    gumbel: Any  # (S, V) float32, None where no row samples from the whole distribution

    @classmethod
    def of(cls, settings: Settings, position: jax.Array, vocab: int, how: Mode) -> Self:
        if not how.drawn:
            return cls(None, None)
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(settings.seed, position)
        return cls(keys, jax.vmap(lambda k: jax.random.gumbel(k, (vocab,), jnp.float32))(keys) if how.plain else None)

    def again(self) -> Self:
        """For a second draw, where the first may not be: ids then come as if drawn among those that may be. With the
        same noise the likeliest of these is that very draw; filtered rows need other keys."""
        if self.keys is None:
            return self
        return self._replace(keys=jax.vmap(lambda key: jax.random.fold_in(key, 2))(self.keys))


def sample(logits: jax.Array, settings: Settings, chance: Chance, how: Mode, cap: Callable = lambda z: z) -> jax.Array:
    """logits (S, V) float32 -> ids (S,) int32. `how` is `mode` of these rows. cap: the model's softcap, if the logits
    are without it; as it keeps their order, it is taken of the likeliest alone."""
    ids = _argmax(logits) if how.greedy else jnp.zeros(logits.shape[:1], jnp.int32)
    if not how.drawn:
        return ids

    def scaled(z):
        return cap(z) / jnp.maximum(settings.temperature, COLDEST)[:, None]

    sampled, filtered = settings.temperature > 0, (settings.top_k > 0) | (settings.top_p < 1)
    if how.plain:
        ids = jnp.where(sampled & ~filtered, _argmax(scaled(logits) + chance.gumbel), ids)
    if how.candidates:
        values, places = _top_k(logits, how.candidates)
        ids = jnp.where(sampled & filtered, _from_the_top(scaled(values), places, settings, chance.keys), ids)
    return ids


class Allowed(NamedTuple):
    """Which ids rows may say at one place of a slice. Numpy arrays to be filled in, or jax's."""

    place: Any  # (S,) int32; NOWHERE where all may be said
    bits: Any  # (S, ceil(V / 32)) int32, the lowest bit first

    @classmethod
    def blank(cls, rows: int, vocab: int) -> Self:
        return cls(np.full(rows, NOWHERE, np.int32), np.zeros((rows, -(-vocab // 32)), np.int32))

    def corrected(self, new: jax.Array, i, draw) -> tuple[jax.Array, jax.Array]:
        """New ids (S,) of place i, and which of them were drawn again, by draw(fits (S, V)), as they may not stand at
        the row's place. (What may stand behind that is not known here: mostly the same.)"""
        bit = jnp.take_along_axis(self.bits, new[:, None] // 32, axis=1)[:, 0] >> (new % 32) & 1
        wrong = (i >= self.place) & (bit == 0)

        def again():
            fits = (self.bits[..., None] >> jnp.arange(32) & 1).reshape(len(new), -1) == 1
            return jnp.where(wrong, draw(fits), new)

        return jax.lax.cond(wrong.any(), again, lambda: new), wrong


def _argmax(x: jax.Array) -> jax.Array:
    """The first place of the maximum of each row, int32: two plain reductions, which on a CPU beat XLA's argmax."""
    places = jnp.where(x == x.max(axis=-1, keepdims=True), jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1])
    return places.min(axis=-1)


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k of rows (S, V), faster: the k groups with the largest maxima hold the k largest entries."""
    S, V = x.shape
    size = 2 ** round(math.log2(math.sqrt(V / k)))  # V / size maxima and k * size entries: as few as can be
    if 8 * k > V:
        values, ids = jax.lax.top_k(x, k)
        return values, ids.astype(jnp.int32)
    groups = -(-V // size)
    grouped = jnp.pad(x, ((0, 0), (0, groups * size - V)), constant_values=-jnp.inf).reshape(S, groups, size)
    if devices.platform() == "gpu" and S * max(groups, k * size) ** 2 <= COMPARISONS:
        best = jnp.broadcast_to(jnp.arange(groups), (S, groups))
        chosen = _by_rank(grouped.max(axis=-1), best, k)[1]
        values = jnp.take_along_axis(grouped, chosen[..., None], axis=1)
        ids = chosen[..., None] * size + jnp.arange(size)
        return _by_rank(values.reshape(S, -1), ids.reshape(S, -1), k)
    chosen = jnp.sort(jax.lax.top_k(grouped.max(axis=-1), k)[1], axis=-1)  # sorted: of equals the first is taken
    values, places = jax.lax.top_k(jnp.take_along_axis(grouped, chosen[..., None], axis=1).reshape(S, -1), k)
    return values, (jnp.take_along_axis(chosen, places // size, axis=1) * size + places % size).astype(jnp.int32)


def _by_rank(x: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of rows (S, n), in falling order, and their ids (S, n) int32; of equals the smaller id comes first.

    All pairs are compared, all at once: for a few rows a GPU takes a fifth of the time of a sort.
    """
    above = (x[:, None] > x[..., None]) | ((x[:, None] == x[..., None]) & (ids[:, None] < ids[..., None]))
    rank = above.sum(axis=-1, dtype=jnp.int32)
    wanted = rank[:, None] == jnp.arange(k)[:, None]  # (S, k, n)
    found = jnp.where(wanted, x[:, None], 0.0).sum(axis=-1)
    return found, jnp.where(wanted, ids[:, None], 0).sum(axis=-1, dtype=jnp.int32)


def log_probabilities(logits: jax.Array, chosen: jax.Array):
    """log p of chosen (S,), and of the likeliest: (S,) float32, ids (S, TOP_LOGPROBS) int32, values alike."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    values, ids = _top_k(logp, min(TOP_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(logp, chosen[:, None], axis=1)[:, 0], ids, values


def _from_the_top(values, ids, settings: Settings, keys):
    """Draws from the top_k likeliest, of these from the fewest whose probability reaches top_p. values (S, n): over the
    temperature, descending, of ids (S, n)."""
    candidates = values.shape[1]
    k = jnp.where(settings.top_k > 0, settings.top_k, candidates)[:, None]
    kept = jnp.arange(candidates) < k
    probs = jax.nn.softmax(jnp.where(kept, values, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    probs = jnp.where(before < settings.top_p[:, None], probs, 0.0)
    cumulative = jnp.cumsum(probs, axis=-1)
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)[:, None]
    # the first place where the cumulative probability passes u; places of probability 0 are never it
    place = jnp.argmax(cumulative > u * cumulative[:, -1:], axis=-1)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]

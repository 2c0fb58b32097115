"""What a model thinks of given texts: losses and guesses per token, logits at the end. Nothing is sampled here.

CORE, bits per byte and the multiple-choice tasks all go through `Scorer`. It turns lists of ids of any length into a
few fixed shapes: sorted by length, so many rows a batch, each padded to the next of a few lengths, so that a whole
evaluation compiles about ten programs. The head reads only the positions asked for, in chunks: logits of a whole batch
are never in memory, and a question with a long context costs the head no more than its answer.

    scorer = Scorer(model, batch_rows=32)
    nll, best = scorer.token_losses([ids])[0]
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.loss import token_nll

SHORTEST = 64  # tokens of the shortest bucket
FEWEST = 128  # positions of the smallest batch of positions that the head reads
IN_FLIGHT = 2  # batches handed to the device before the first result is waited for


class TokenScores(NamedTuple):
    """Of the targets of one sequence, in order: their loss in nats (n,) float32, and the likeliest ids (n,) int32."""

    nll: np.ndarray
    best: np.ndarray


def bucket(length: int, longest: int) -> int:
    """The padded length for `length` tokens: 64, 96, 128, 192, 256, ... in steps of at most 1.5, up to `longest`."""
    size = SHORTEST
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return min(size, longest)


def crop_left(ids: Sequence[int], start: int, end: int, limit: int) -> tuple[Sequence[int], int, int]:
    """The last `limit` ids, with the span [start, end) moved along; it starts at 1 at least, as ids[0] is no target."""
    cut = max(0, len(ids) - limit)
    return ids[cut:], max(1, start - cut), end - cut


# The model's graph is a static argument, so that a second Scorer of the same architecture compiles nothing anew.


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph, state, tokens):
    """tokens (R, T) -> (R, T, D)."""
    return nnx.merge(graph, state).hidden(tokens)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _nll_at(hidden, head, index, targets, vocab, softcap):
    """index and targets (M,), index into the R * T positions -> nll (M,) float32, best (M,) int32."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return token_nll(flat[index], head, targets, vocab=vocab, softcap=softcap)


@functools.partial(jax.jit, static_argnums=4)
def _candidates_at(hidden, head, index, candidates, softcap):
    """index (R,), candidates (R, C) ids -> softcapped logits (R, C) float32."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    z = jnp.einsum("rd,rcd->rc", flat[index], head[candidates], preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(z / softcap)


class Scorer:
    """Scores sequences with `model`, `batch_rows` at a time; `place` puts a batch on the devices.

    The model needs hidden(tokens) (R, T) -> (R, T, D), lm_head.weight (padded V, D), dtype, and cfg with vocab_size,
    sequence_len and softcap. Sequences longer than sequence_len are cropped at the left.
    """

    def __init__(self, model, batch_rows: int = 32, place: Callable[[np.ndarray], jax.Array] = jnp.asarray):
        self.cfg, self.batch_rows, self._place = model.cfg, batch_rows, place
        self._graph, state = nnx.split(model)
        # Once, and not in every call: what the products use. Vectors and scalars stay as they are.
        self._state = jax.tree.map(lambda p: p.astype(model.dtype) if p.ndim > 1 else p, state)
        self._head = model.lm_head.weight[...].astype(model.dtype)

    # ---------------------------------------------------------------------------------------------- public

    def token_losses(
        self, sequences: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]] | None = None
    ) -> list[TokenScores]:
        """Loss and best guess at the tokens [start, end) of each sequence; by default at all but its first.

        A sequence of n tokens has targets 1 to n - 1. Where cropping cuts into a span, the rest of it is scored.
        """
        spans = spans or [(1, len(ids)) for ids in sequences]
        cropped = [crop_left(ids, s, e, self.cfg.sequence_len) for ids, (s, e) in zip(sequences, spans)]

        def score(rows: list[int], hidden: jax.Array):
            T = hidden.shape[1]
            index, targets = [], []
            for r, i in enumerate(rows):
                ids, start, end = cropped[i]
                index += range(r * T + start - 1, r * T + end - 1)
                targets += ids[start:end]
            size = FEWEST
            while size < len(index):
                size *= 2
            pad = size - len(index)
            at, want = np.array(index + [0] * pad, np.int32), np.array(targets + [-1] * pad, np.int32)
            return _nll_at(hidden, self._head, at, want, self.cfg.vocab_size, self.cfg.softcap)

        out: list[TokenScores] = [None] * len(cropped)
        for rows, (nll, best) in self._batches([ids for ids, _, _ in cropped], score):
            at = 0
            for i in rows:
                n = max(0, cropped[i][2] - cropped[i][1])
                out[i] = TokenScores(nll[at : at + n], best[at : at + n])
                at += n
        return out

    def last_logits(self, sequences: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits after the last token of each sequence, of its candidate ids only: float32 arrays, one per sequence."""
        limit, most = self.cfg.sequence_len, max((len(c) for c in candidates), default=1)

        def score(rows: list[int], hidden: jax.Array):
            R, T = hidden.shape[:2]
            index, ids = np.zeros(R, np.int32), np.zeros((R, most), np.int32)
            for r, i in enumerate(rows):
                index[r] = r * T + min(len(sequences[i]), limit) - 1
                ids[r, : len(candidates[i])] = candidates[i]
            return (_candidates_at(hidden, self._head, index, ids, self.cfg.softcap),)

        out: list[np.ndarray] = [None] * len(sequences)
        for rows, (logits,) in self._batches([s[-limit:] for s in sequences], score):
            for r, i in enumerate(rows):
                out[i] = logits[r, : len(candidates[i])]
        return out

    def row_losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """tokens and targets (R, T) int32, targets negative where there is none -> losses (R, T) float32, 0 there."""
        hidden = _hidden(self._graph, self._state, self._place(np.asarray(tokens, np.int32)))
        index = np.arange(tokens.size, dtype=np.int32)
        flat = np.asarray(targets, np.int32).reshape(-1)
        nll, _ = _nll_at(hidden, self._head, index, flat, self.cfg.vocab_size, self.cfg.softcap)
        return _to_host(nll).reshape(tokens.shape)

    # ---------------------------------------------------------------------------------------------- batches

    def _batches(self, sequences: list[Sequence[int]], score: Callable) -> Iterator[tuple[list[int], tuple]]:
        """(indices of a batch, its results as numpy arrays), the longest sequences first.

        Longest first: then only the last batch, the cheapest, has rows to spare, and memory is highest at once.
        """
        order = sorted((i for i in range(len(sequences)) if sequences[i]), key=lambda i: -len(sequences[i]))
        if len(order) < len(sequences):
            raise ValueError("a sequence to score must hold one token at least")
        rows = 1
        while rows < min(len(order), self.batch_rows):
            rows *= 2
        rows = min(rows, self.batch_rows)
        pending: deque = deque()
        for at in range(0, len(order), rows):
            batch = order[at : at + rows]
            tokens = np.zeros((rows, bucket(len(sequences[batch[0]]), self.cfg.sequence_len)), np.int32)
            for r, i in enumerate(batch):
                tokens[r, : len(sequences[i])] = sequences[i]
            hidden = _hidden(self._graph, self._state, self._place(tokens))
            pending.append((batch, score(batch, hidden)))
            if len(pending) > IN_FLIGHT:
                yield _fetch(pending.popleft())
        yield from map(_fetch, pending)


def _fetch(item: tuple[list[int], Iterable[jax.Array]]) -> tuple[list[int], tuple]:
    batch, arrays = item
    return batch, tuple(_to_host(a) for a in arrays)


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every host; a part of it may be with others."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)

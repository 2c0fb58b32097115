"""What a model thinks of given texts: losses and guesses per token, logits at the end. Nothing is sampled here.

CORE, bits per byte and the multiple-choice tasks all go through `Scorer`. It turns questions of any length into a few
fixed shapes: those of like length together, so many rows a batch, padded to the next of a few lengths. What the texts
of a question share is computed once (branches.py), and the head reads only the positions asked for, in chunks: logits
of a whole batch are never in memory, and a question with a long context costs the head no more than its answers.

    scorer = Scorer(model, batch_rows=32)
    ((nll, best),) = scorer.token_losses([[(ids, 1, len(ids))]])[0]

On a mesh, rows are split over its data axes, and parameters lie as sharding.py says.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evals import branches
from evals.branches import Answer, Tree
from evals.shapes import branch_bucket, fineness, power_of_four, prefix_bucket, stack, width_of
from nanochat_jax.mesh import sharding
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import token_nll

IN_FLIGHT = 1  # batches handed to the device before the result of the one ahead is waited for


class TokenScores(NamedTuple):
    """Of the targets of one text, in order: their loss in nats (n,) float32, and the likeliest ids (n,) int32."""

    nll: np.ndarray
    best: np.ndarray


def crop_left(answers: Sequence[Answer], limit: int) -> list[Answer]:
    """Texts of one question with the same number of ids cut off at the left, so that `limit` are left of the longest.

    Spans move along; they start at 1 at least, as the first id is no target.
    """
    cut = max(0, max(len(ids) for ids, _, _ in answers) - limit)
    return [(ids[cut:], max(1, start - cut), max(1, end - cut)) for ids, start, end in answers]


# ------------------------------------------------------------------------------------------------- the programs
# The model's graph and the mesh are static arguments, so that a second Scorer of the same kind compiles nothing anew.


def _program(*static: int):
    """A jitted function of (graph, mesh, params, ...), run by every device on its own rows."""
    return functools.partial(jax.jit, static_argnums=(0, 1, *static))


def _by_rows(local: Callable, graph, mesh) -> Callable:
    def run(params, *arrays):
        return local(gpt.merge(graph, params), *arrays)

    return run if mesh is None else sharding.each_row(run, mesh, leading=0)


@_program()
def _row_losses(graph, mesh, params, tokens, targets):
    """(R, T) -> (R, T) float32."""

    def local(model, tokens, targets):
        return _losses(model, model.hidden(tokens), targets)[0]

    return _by_rows(local, graph, mesh)(params, tokens, targets)


@_program(4)
def _prefixes(graph, mesh, params, tokens, width):
    """tokens (R, P) -> keys and values, (R, width, K, N) for each layer."""

    def local(model, tokens):
        return branches.prefix_states(model, tokens, width)

    return _by_rows(local, graph, mesh)(params, tokens)


@_program()
def _branch_losses(graph, mesh, params, kept, rows, index, targets, count):
    """rows: of branch_hidden. On each of N devices the first `count` (N,) of F targets: (N, F) ids, and index (N, F)
    into the R / N * S positions there -> losses (N, F) float32 and best guesses (N, F) int32; the rest is not computed.
    """

    def local(model, kept, rows, index, targets, count):
        hidden = branches.branch_hidden(model, kept, **rows)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chunk = min(fineness().head, index.shape[1])

        def step(i, found):
            part = [jax.lax.dynamic_slice_in_dim(a[0], i * chunk, chunk) for a in (index, targets)]
            new = _losses(model, hidden[part[0]], part[1])
            return tuple(jax.lax.dynamic_update_slice_in_dim(a, n[None], i * chunk, 1) for a, n in zip(found, new))

        empty = (jnp.zeros(index.shape, jnp.float32), jnp.zeros(index.shape, jnp.int32))
        return jax.lax.fori_loop(0, -(-count[0] // chunk), step, empty)

    return _by_rows(local, graph, mesh)(params, kept, rows, index, targets, count)


@_program()
def _branch_logits(graph, mesh, params, kept, rows, candidates):
    """candidates (R, C) ids -> softcapped logits (R, C) float32 after the stem, which is all that `rows` hold."""

    def local(model, kept, rows, candidates):
        hidden = branches.branch_hidden(model, kept, **rows)[:, 0]
        head = model.lm_head.weight[...].astype(hidden.dtype)[candidates]
        z = jnp.einsum("rd,rcd->rc", hidden, head, preferred_element_type=jnp.float32)
        return model.cfg.softcap * jnp.tanh(z / model.cfg.softcap)

    return _by_rows(local, graph, mesh)(params, kept, rows, candidates)


def _losses(model, hidden, targets):
    head = model.lm_head.weight[...].astype(hidden.dtype)
    return token_nll(hidden, head, targets, vocab=model.cfg.vocab_size, softcap=model.cfg.softcap)


# ------------------------------------------------------------------------------------------------------- scorer


class Scorer:
    """Scores texts with `model`, on one device or, with a mesh, over the devices of that.

    The model is a GPT. Texts longer than the context, or than `limit`, are cropped at the left. batch_rows is what
    row_losses should be given at a time, and bounds a batch to as many contexts' worth of tokens.
    """

    def __init__(self, model, batch_rows: int = 32, mesh: jax.sharding.Mesh | None = None):
        self.cfg, self.batch_rows = model.cfg, batch_rows
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._devices = 1 if self._mesh is None else sharding.data_parallel(self._mesh)
        self._fine = fineness()
        self._tokens = min(self._fine.tokens, -(-batch_rows * self.cfg.sequence_len // self._devices))
        self._graph, state = nnx.split(model)
        # Once, and not in every call: what the products use. Vectors and scalars stay as they are.
        self._params = gpt.cast_matrices(nnx.to_pure_dict(state), model.dtype)
        if self._mesh is not None:
            self._params = jax.device_put(self._params, sharding.tree_shardings(self._params, self._mesh))

    # ---------------------------------------------------------------------------------------------- public

    def token_losses(self, questions: Sequence[Sequence[Answer]], limit: int | None = None) -> list[list[TokenScores]]:
        """Loss and best guess at the tokens [start, end) of each text, (ids, start, end), of each question.

        A text of n tokens has targets 1 to n - 1. Where cropping cuts into a span, the rest of it is scored; the texts
        of a question are cropped alike, and so go on sharing their beginning.
        """
        limit = limit or self.cfg.sequence_len
        trees = [branches.grow(crop_left(answers, limit)) for answers in questions]

        def score(batch: list[int], kept, arrays):
            rows, size = arrays["tokens"].shape
            each = rows // self._devices  # rows of a device; its trees' targets stand one behind the other
            index, targets = (np.zeros((self._devices, each * size), np.int32) for _ in range(2))
            count, places = np.zeros(self._devices, np.int32), []
            for row, i in enumerate(batch):
                device, n = row // each, len(trees[i].targets)
                at = slice(count[device], count[device] + n)
                index[device, at] = np.asarray(trees[i].index, np.int32) + row % each * size
                targets[device, at] = trees[i].targets
                count[device] += n
                places.append((device, at))
            losses = _branch_losses(*self._static, self._params, kept, arrays, *self._put((index, targets, count)))
            return places, losses

        out: list[list[TokenScores]] = [None] * len(trees)
        for i, (nll, best) in self._scored(trees, score):
            out[i] = [TokenScores(nll[span], best[span]) for span in trees[i].spans]
        return out

    def last_logits(self, sequences: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits after the last token of each sequence, of its candidate ids only: float32 arrays, one per sequence."""
        most = max((len(c) for c in candidates), default=1)
        ends = [[(ids, len(ids), len(ids))] for ids in sequences]
        trees = [branches.grow(crop_left(end, self.cfg.sequence_len)) for end in ends]

        def score(batch: list[int], kept, arrays):
            ids = stack([candidates[i] for i in batch], (len(arrays["tokens"]), most), 0)
            return range(len(batch)), (_branch_logits(*self._static, self._params, kept, arrays, self._put(ids)),)

        out: list[np.ndarray] = [None] * len(trees)
        for i, (logits,) in self._scored(trees, score):
            out[i] = logits[: len(candidates[i])]
        return out

    def row_losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """tokens and targets (R, T) int32, targets negative where there is none -> losses (R, T) float32, 0 there."""
        n, width = tokens.shape
        whole = -(-n // self._devices) * self._devices
        each = min(whole, max(1, self._tokens // width) * self._devices)
        spare = ((0, -n % each), (0, 0))
        tokens, targets = (np.pad(np.asarray(a, np.int32), spare) for a in (tokens, targets))
        found = [
            _row_losses(*self._static, self._params, *self._put((tokens[at : at + each], targets[at : at + each])))
            for at in range(0, n, each)
        ]
        return np.concatenate([_to_host(x) for x in found])[:n]

    # ---------------------------------------------------------------------------------------------- batches

    @property
    def _static(self) -> tuple:
        return self._graph, self._mesh

    def _put(self, arrays):
        """Host arrays (R, ...) on the devices, rows split over them."""
        if self._mesh is None:
            return arrays
        split = sharding.rows(self._mesh)
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, split, lambda at: a[at]), arrays)

    def _scored(self, trees: list[Tree], score: Callable) -> Iterator[tuple[int, tuple]]:
        """(index of a tree, its part of score's results as numpy arrays), in the order in which they are done.

        score(batch, kept, arrays) -> (where each of the batch is in the results, results on the devices).
        """
        if any(not tree.tokens for tree in trees):
            raise ValueError("a sequence to score must hold one token at least")
        pending: deque = deque()
        for batch, rows in self._batches(trees):
            group = [trees[i] for i in batch]
            longest, shape = max(len(t.prefix) for t in group), (rows, self._size(group[0]))
            prefixes = stack([t.prefix for t in group], (rows, prefix_bucket(longest, self._fine.steps)), 0)
            kept = _prefixes(*self._static, self._params, self._put(prefixes), width_of(longest))
            fill = {"tokens": 0, "before": -1, "positions": 0, "branch": branches.NOTHING}
            arrays = {name: stack([getattr(t, name) for t in group], shape, value) for name, value in fill.items()}
            arrays["lengths"] = np.array([len(t.prefix) for t in group] + [0] * (rows - len(group)), np.int32)
            pending.append((batch, *score(batch, kept, self._put(arrays))))
            if len(pending) > IN_FLIGHT:
                yield from _fetch(pending.popleft())
        while pending:
            yield from _fetch(pending.popleft())

    def _size(self, tree: Tree) -> int:
        return branch_bucket(max(len(tree.tokens), len(tree.targets)), self._fine.steps)

    def _batches(self, trees: list[Tree]) -> Iterator[tuple[list[int], int]]:
        """(indices of trees of one size, rows of their batch), the longest prefixes first.

        The number of rows follows from the widths, not from how many trees are left, so that there are few programs;
        rows to spare stay empty.
        """

        def size(i: int) -> int:
            return self._size(trees[i])

        most = power_of_four(max(1, -(-len(trees) // self._devices)))
        for branch_tokens, found in groupby(sorted(range(len(trees)), key=size, reverse=True), size):
            order, at = sorted(found, key=lambda i: -len(trees[i].prefix)), 0
            while at < len(order):
                fit = self._tokens // max(branch_tokens, width_of(len(trees[order[at]].prefix)))
                rows = min(most, max(1, fit)) * self._devices
                yield order[at : at + rows], rows
                at += rows


def _fetch(done: tuple[list[int], Iterable, Iterable[jax.Array]]) -> Iterator[tuple[int, tuple]]:
    batch, places, results = done
    results = tuple(_to_host(a) for a in results)
    return ((i, tuple(a[place] for a in results)) for i, place in zip(batch, places, strict=True))


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every host; a part of it may be with others."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)

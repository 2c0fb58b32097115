"""The losses and logits that a model gives to texts. Nothing is sampled here.

Questions of any length are padded to a few shapes, so that few programs are compiled. The prefix that the texts of a
question share is computed once (branches.py), and the head reads only the positions asked for, in chunks: logits of a
whole batch are never in memory. On a mesh, rows are split over its data axes, and parameters as sharding.py says.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evals import branches
from evals.branches import Answer, Kept, Tree
from nanochat_jax import devices
from nanochat_jax.mesh import sharding
from nanochat_jax.model import gpt
from nanochat_jax.model.loss import token_nll

# What is computed of a batch: indices of its trees, where each of these is in the results, results on the devices.
Scored = tuple[Sequence[int], Iterable, Sequence[jax.Array]]

SHORTEST = 16  # tokens of the shortest bucket of prefixes, and of the least step from one to the next


class Fineness(NamedTuple):
    tokens: int  # of a batch on each device
    steps: int  # buckets of prefixes in each doubling of their length
    head: int  # targets whose logits are in memory at a time


# A CPU is fastest where a batch fits its caches, and waits longer for what fills rows up than for compiling. On an
# accelerator the keys and values of a batch count: 1.2 GB at depth 24 in bfloat16, beside all that training holds.
CPU, ACCELERATOR = Fineness(2048, 4, 64), Fineness(8192, 1, 512)


class TokenScores(NamedTuple):
    """Of the targets of one text, in order: their loss in nats (n,) float32, and the likeliest ids (n,) int32."""

    nll: np.ndarray
    best: np.ndarray


def fineness() -> Fineness:
    return CPU if devices.platform() == "cpu" else ACCELERATOR


def power_of_four(n: int) -> int:
    """The next one, not below n >= 1."""
    return 1 << 2 * -(-(n - 1).bit_length() // 2)


def prefix_bucket(length: int, steps: int) -> int:
    """The padded length of a prefix: 16, 32, 64, ... with `steps` of equal size, at least 16, in each doubling."""
    size = SHORTEST
    while 2 * size < length:
        size *= 2
    step = max(SHORTEST, size // steps)
    return max(size, -(-length // step) * step)


def branch_bucket(size: int, steps: int) -> int:
    """The padded number of branch tokens, or of targets: 1, 4, 16, and then powers of four, or of two if fine."""
    return power_of_four(size) if steps == 1 or size <= SHORTEST else 1 << (size - 1).bit_length()


def stack(lists: Sequence[Sequence[int]], shape: tuple[int, int], fill: int) -> np.ndarray:
    """int32 of a shape, each list at the left of its row."""
    out = np.full(shape, fill, np.int32)
    for row, values in zip(out, lists):
        row[: len(values)] = values
    return out


def crop_left(answers: Sequence[Answer], limit: int) -> list[Answer]:
    """Texts of one question with the same number of ids cut off at the left, so that `limit` are left of the longest.

    Spans move along; they start at 1 at least, as the first id is no target.
    """
    cut = max(0, max(len(ids) for ids, _, _ in answers) - limit)
    return [(ids[cut:], max(1, start - cut), max(1, end - cut)) for ids, start, end in answers]


def _program(local: Callable) -> Callable:
    """local(model, *arrays) as a jitted function of (graph, mesh, params, *arrays); each device does its own rows.

    Graph and mesh are static arguments, so that a second Scorer of the same kind compiles nothing anew.
    """

    def program(graph, mesh, params, *arrays):
        def run(params, *arrays):
            return local(gpt.merge(graph, params), *arrays)

        return (run if mesh is None else sharding.each_row(run, mesh, leading=0))(params, *arrays)

    program.__name__ = local.__name__
    return jax.jit(program, static_argnums=(0, 1))


@_program
def _row_losses(model, tokens, targets):
    """(R, T) -> (R, T) float32."""
    return _losses(model, model.hidden(tokens), targets)[0]


@_program
def _prefixes(model, tokens):
    """tokens (R, P) -> keys and values, (R, width, K, N) for each layer; width is P or the next power of four."""
    return branches.prefix_states(model, tokens, power_of_four(tokens.shape[1]))


@_program
def _branch_losses(model, kept, rows, index, targets, count):
    """rows: of branch_hidden. On each of N devices the first `count` (N,) of F targets: (N, F) ids, and index (N, F)
    into the R / N * S positions there -> losses (N, F) float32 and best guesses (N, F) int32; the rest is not computed.
    """
    hidden = branches.branch_hidden(model, kept, **rows)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(fineness().head, index.shape[1])

    def step(i, found):
        part = [jax.lax.dynamic_slice_in_dim(a[0], i * chunk, chunk) for a in (index, targets)]
        new = _losses(model, hidden[part[0]], part[1])
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, n[None], i * chunk, 1) for a, n in zip(found, new))

    empty = (jnp.zeros(index.shape, jnp.float32), jnp.zeros(index.shape, jnp.int32))
    return jax.lax.fori_loop(0, -(-count[0] // chunk), step, empty)


@_program
def _branch_logits(model, kept, rows, candidates):
    """candidates (R, C) ids -> softcapped logits (R, C) float32 after the stem, which is all that `rows` hold."""
    hidden = branches.branch_hidden(model, kept, **rows)[:, 0]
    head = model.lm_head.weight[...].astype(hidden.dtype)[candidates]
    z = jnp.einsum("rd,rcd->rc", hidden, head, preferred_element_type=jnp.float32)
    return model.cfg.softcap * jnp.tanh(z / model.cfg.softcap)


def _losses(model, hidden, targets):
    head = model.lm_head.weight[...].astype(hidden.dtype)
    return token_nll(hidden, head, targets, vocab=model.cfg.vocab_size, softcap=model.cfg.softcap)


class Scorer:
    """Scores texts with a GPT, on one device or over those of a mesh. Texts longer than the context, or than `limit`,
    are cropped at the left. A batch has the tokens of at most `batch_rows` contexts.
    """

    def __init__(self, model, batch_rows: int = 32, mesh: jax.sharding.Mesh | None = None):
        self.cfg, self.batch_rows = model.cfg, batch_rows
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._devices = 1 if self._mesh is None else sharding.data_parallel(self._mesh)
        self._fine = fineness()
        self._tokens = min(self._fine.tokens, -(-batch_rows * self.cfg.sequence_len // self._devices))
        self._graph, state = nnx.split(model)
        # Cast once, and not in every call, to what the products use. Vectors and scalars stay as they are.
        self._params = gpt.cast_matrices(nnx.to_pure_dict(state), model.dtype)
        if self._mesh is not None:
            self._params = jax.device_put(self._params, sharding.tree_shardings(self._params, self._mesh))

    def token_losses(self, questions: Sequence[Sequence[Answer]], limit: int | None = None) -> list[list[TokenScores]]:
        """Loss and best guess at the tokens [start, end) of each text, (ids, start, end), of each question.

        A text of n tokens has targets 1 to n - 1. Where cropping cuts into a span, the rest of it is scored; the texts
        of a question are cropped alike, and so go on sharing their beginning.
        """
        trees = [branches.grow(crop_left(answers, limit or self.cfg.sequence_len)) for answers in questions]
        found = {}
        for i, (nll, best) in _fetched(self._score_targets(trees)):
            found[i] = [TokenScores(nll[span], best[span]) for span in trees[i].spans]
        return [found[i] for i in range(len(trees))]

    def last_logits(self, sequences: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits after the last token of each sequence, of its candidate ids only: float32 arrays, one per sequence."""
        ends = [[(ids, len(ids), len(ids))] for ids in sequences]
        trees = [branches.grow(crop_left(end, self.cfg.sequence_len)) for end in ends]
        found = {i: z[: len(candidates[i])] for i, [z] in _fetched(self._score_candidates(trees, candidates))}
        return [found[i] for i in range(len(trees))]

    def row_losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """tokens and targets (R, T) int32, targets negative where there is none -> losses (R, T) float32, 0 there."""
        n, width = tokens.shape
        each = min(-(-self.batch_rows // self._devices), max(1, self._tokens // width)) * self._devices
        padding = ((0, -n % each), (0, 0))  # so that all batches have one shape
        tokens, targets = (np.pad(np.asarray(a, np.int32), padding) for a in (tokens, targets))
        batches = [(tokens[at : at + each], targets[at : at + each]) for at in range(0, n, each)]
        losses = [self._run(_row_losses, *self._put(b)) for b in batches]
        return np.concatenate([sharding.to_host(x) for x in losses])[:n]

    def _run(self, program: Callable, *arrays):
        return program(self._graph, self._mesh, self._params, *arrays)

    def _put(self, arrays):
        """Host arrays (R, ...) on the devices, rows split over them."""
        return arrays if self._mesh is None else sharding.split_rows(arrays, self._mesh)

    def _score_targets(self, trees: list[Tree]) -> Iterator[Scored]:
        for batch, kept, rows in self._batches(trees):
            n, size = rows["tokens"].shape
            each = n // self._devices  # rows of a device; the targets of its trees are packed one after the other
            index, targets = (np.zeros((self._devices, each * size), np.int32) for _ in range(2))
            count, places = np.zeros(self._devices, np.int32), []
            for row, tree in enumerate(trees[i] for i in batch):
                device = row // each
                at = slice(count[device], count[device] + len(tree.targets))
                index[device, at] = np.asarray(tree.sources, np.int32) + row % each * size
                targets[device, at] = tree.targets
                count[device] = at.stop
                places.append((device, at))
            yield batch, places, self._run(_branch_losses, kept, rows, *self._put((index, targets, count)))

    def _score_candidates(self, trees: list[Tree], candidates: Sequence[Sequence[int]]) -> Iterator[Scored]:
        """Logits of the candidates, padded to the largest number of them."""
        most = max((len(c) for c in candidates), default=1)
        for batch, kept, rows in self._batches(trees):
            ids = stack([candidates[i] for i in batch], (len(rows["tokens"]), most), 0)
            yield batch, range(len(batch)), [self._run(_branch_logits, kept, rows, self._put(ids))]

    def _batches(self, trees: list[Tree]) -> Iterator[tuple[list[int], Kept, dict]]:
        """(indices of trees of one size, keys and values of their prefixes, arrays for branch_hidden), longest prefixes
        first. The number of rows follows from the widths, not from how many trees are left: so there are few programs.
        """
        if any(not tree.tokens for tree in trees):
            raise ValueError("a sequence to score must hold one token at least")

        def size(i: int) -> int:
            return branch_bucket(max(len(trees[i].tokens), len(trees[i].targets)), self._fine.steps)

        most = power_of_four(max(1, -(-len(trees) // self._devices)))
        for branch_tokens, alike in groupby(sorted(range(len(trees)), key=size, reverse=True), size):
            order = sorted(alike, key=lambda i: -len(trees[i].prefix))
            while order:
                prefix_tokens = prefix_bucket(len(trees[order[0]].prefix), self._fine.steps)
                fit = self._tokens // max(branch_tokens, power_of_four(prefix_tokens))
                n = min(most, max(1, fit)) * self._devices
                batch, order = order[:n], order[n:]
                group = [trees[i] for i in batch]
                prefixes = stack([t.prefix for t in group], (n, prefix_tokens), 0)
                fill = {"tokens": 0, "before": -1, "positions": 0, "branch": branches.NOTHING}
                rows = {k: stack([getattr(t, k) for t in group], (n, branch_tokens), v) for k, v in fill.items()}
                rows["lengths"] = np.array([len(t.prefix) for t in group] + [0] * (n - len(group)), np.int32)
                yield batch, self._run(_prefixes, self._put(prefixes)), self._put(rows)


def _fetched(batches: Iterable[Scored]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(index of a tree, its part of each result); a batch is waited for once the next one is on the device."""
    for (batch, places, results), _ in pairwise(chain(batches, [([], (), ())])):
        arrays = [sharding.to_host(a) for a in results]
        yield from ((i, [a[place] for a in arrays]) for i, place in zip(batch, places, strict=True))

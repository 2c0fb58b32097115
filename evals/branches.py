"""Texts with a common prefix: its keys and values are computed once, and what follows in each text branches off.

A row holds, behind the prefix, only the tokens whose predictions are asked for: the stem, which is the last token that
all texts share, and then the branches, one after the other. A token attends to the prefix, the stem and what is before
it in its own branch, where its position, and so windows and rotary angles, and the token that the smear adds, are those
of the text by itself. The last token of a text is a target only and is not computed.

Shapes: R rows, P tokens of a prefix, S of stem and branches, M targets, D width, H heads, K key/value heads, N head
size.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.model.attention import is_offset

STEM, NOTHING = 0, -1  # in place of a branch's number: what all attend to, and padding

Answer = tuple[Sequence[int], int, int]  # ids of a text and the span [start, end) of its targets, start >= 1
Kept = list[tuple[jax.Array, jax.Array]]  # per layer the keys and values of the prefixes, (R, P, K, N)


class Tree(NamedTuple):
    """One question: texts with what is to be predicted in them."""

    prefix: Sequence[int]
    tokens: list[int]  # (S,)
    before: list[int]  # (S,) the token before each in its text, -1 for none
    positions: list[int]  # (S,)
    branch: list[int]  # (S,) STEM, or 1, 2, ...
    sources: list[int]  # (M,) which of the S predicts each target
    targets: list[int]  # (M,)
    spans: list[slice]  # per answer, where its targets are among the M; answers that are equal share them


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    alike = takewhile(lambda ids: all(i == ids[0] for i in ids), zip(*sequences))
    return sum(1 for _ in alike)


def grow(answers: Sequence[Answer]) -> Tree:
    keys = [(tuple(ids), start, end) for ids, start, end in answers]
    texts = list(dict.fromkeys(keys))  # equal ones score equal, to the last bit
    shared = min(common_prefix([ids for ids, _, _ in texts]), min(start for _, start, _ in texts))
    first, stem = texts[0][0], max(0, shared - 1)
    nodes = [(first, stem, STEM)] if shared else []  # text, position in it, branch
    sources: list[int] = []
    targets: list[int] = []
    spans = {}
    for branch, (ids, start, end) in enumerate(texts, STEM + 1):
        at = len(nodes) - shared  # plus the position is the place
        nodes += [(ids, position, branch) for position in range(shared, end - 1)]
        spans[ids, start, end] = slice(len(targets), len(targets) + end - start)
        sources += [0 if t == shared else at + t - 1 for t in range(start, end)]
        targets += ids[start:end]
    return Tree(
        prefix=first[:stem],
        tokens=[ids[position] for ids, position, _ in nodes],
        before=[ids[position - 1] if position else -1 for ids, position, _ in nodes],
        positions=[position for _, position, _ in nodes],
        branch=[branch for _, _, branch in nodes],
        sources=sources,
        targets=targets,
        spans=[spans[key] for key in keys],
    )


def prefix_states(model, tokens: jax.Array, width: int) -> Kept:
    """Keys and values of prefixes (R, P), padded to `width` places. What the last layer does with them is dropped."""
    kept: Kept = []
    room = ((0, 0), (0, width - tokens.shape[1]), (0, 0), (0, 0))

    def attend(i, q, k, v):
        kept.append((jnp.pad(k, room), jnp.pad(v, room)))
        return model.attend(i, q, k, v)

    model.trunk(tokens, jnp.arange(tokens.shape[1]), attend)
    return kept


def branch_hidden(model, kept: Kept, lengths, tokens, before, positions, branch) -> jax.Array:
    """Hidden states (R, S, D) behind prefixes of `lengths` (R,); the other arrays are (R, S), as in `Tree`."""
    windows, (S, P) = model.cfg.windows, (tokens.shape[1], kept[0][0].shape[1])
    far = positions[:, :, None] - jnp.arange(P)  # (R, S, P), how far back each place of the prefix is
    near = positions[:, :, None] - positions[:, None, :]  # (R, S, S)
    there = (jnp.arange(P) < lengths[:, None])[:, None, :]
    same = (branch[:, :, None] == branch[:, None, :]) | (branch == STEM)[:, None, :]
    same &= jnp.arange(S)[:, None] >= jnp.arange(S)

    previous = _previous(P, lengths, positions, branch) if model.cfg.key_offset else None

    def attend(i, q, k, v):
        seen = jnp.concatenate([there & (far <= windows[i]), same & (near <= windows[i])], axis=-1)
        keys = (kept[i][0], k) if previous is None else _offset(kept[i][0], k, previous)
        return _attend(q, keys, (kept[i][1], v), seen)

    return model.trunk(tokens, positions, attend, prev_tokens=before)


def _previous(P: int, lengths, positions, branch) -> jax.Array:
    """(R, P + S): the place, of prefix and row together, of the token before each in its text; -1 for none."""
    place = P + jnp.arange(positions.shape[1]) - 1
    after_stem = (positions == lengths[:, None] + 1) & (branch[:, :1] == STEM)
    of_row = jnp.where(after_stem, P, jnp.where(positions == lengths[:, None], lengths[:, None] - 1, place))
    return jnp.concatenate([jnp.broadcast_to(jnp.arange(P) - 1, (len(of_row), P)), of_row], axis=1)


def _offset(prefix, row, previous) -> tuple[jax.Array, jax.Array]:
    """Keys (R, P, K, N) and (R, S, K, N), of which half are those of the token before: `attention.offset_keys`."""
    keys = jnp.concatenate([prefix, row], axis=1)
    before = jnp.take_along_axis(keys, jnp.maximum(previous, 0)[:, :, None, None], axis=1)
    keys = jnp.where(is_offset(keys.shape[-1]), jnp.where(previous[:, :, None, None] >= 0, before, 0), keys)
    return keys[:, : prefix.shape[1]], keys[:, prefix.shape[1] :]


def _attend(q, keys, values, seen) -> jax.Array:
    """Attention of queries (R, S, H, N) to two parts, (R, P, K, N) and (R, S, K, N), where `seen` (R, S, P + S)."""
    R, S, H, N = q.shape
    K, P = keys[0].shape[2], keys[0].shape[1]
    q = (q * N**-0.5).reshape(R, S, K, H // K, N)
    parts = [jnp.einsum("rskgn,rpkn->rkgsp", q, k, preferred_element_type=jnp.float32) for k in keys]
    scores = jnp.where(seen[:, None, None], jnp.concatenate(parts, axis=-1), -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    of_prefix, of_row = (jnp.einsum("rkgsp,rpkn->rskgn", p, v) for p, v in zip(jnp.split(probs, [P], axis=-1), values))
    return (of_prefix + of_row).reshape(R, S, H, N)

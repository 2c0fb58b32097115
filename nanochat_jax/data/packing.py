"""Packing documents and conversations into rows of T + 1 tokens by best fit.

Every row starts with <|bos|>. Into what is left of it goes the largest document of a buffer that fits; where none does,
a pretraining row is filled with the beginning of the shortest one (the rest of which is dropped: about a third of the
tokens at a context of 2048, for which every token sees its document from the start), and a row of conversations is
padded instead. Best fit: arXiv 2404.10830.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from nanochat_jax.config import fingerprint
from nanochat_jax.data.packed import MANIFEST, write_packed
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json

REFILL = 128  # documents tokenized at a time
VERSION = 1  # of what is packed: part of the cache's key


class _Buffer:
    """Documents by length. Among those of equal length the one that came first is taken first."""

    def __init__(self):
        self._sorted: list[tuple[int, int, object]] = []  # (length, -arrival, document), arrivals are unique
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, length: int, document) -> None:
        bisect.insort(self._sorted, (length, -next(self._arrivals), document))

    def pop_largest(self, room: int):
        """The largest document of at most `room` tokens, or None."""
        i = bisect.bisect_left(self._sorted, (room + 1,)) - 1
        return self._sorted.pop(i)[2] if i >= 0 else None

    def pop_shortest(self):
        i = bisect.bisect_left(self._sorted, (self._sorted[0][0] + 1,)) - 1
        return self._sorted.pop(i)[2]


def best_fit(
    batches: Iterable[list], row_len: int, buffer_size: int, *, crop: bool, length: Callable = len
) -> Iterator[list[tuple[object, int]]]:
    """Rows of (document, tokens taken), from documents that come in batches.

    crop: fill the row's end with the beginning of the shortest document; else leave it. Documents longer than row_len
    must not come where crop is False. The last rows, for which the buffer runs dry, are made too; with crop a last row
    that cannot be filled is dropped.
    """
    batches, buffer, dry = iter(batches), _Buffer(), False
    while True:
        row, room = [], row_len
        while room > 0:
            while not dry and len(buffer) < buffer_size:
                batch = next(batches, None)
                dry = batch is None
                for document in batch or ():
                    buffer.add(length(document), document)
            if not len(buffer):
                break
            document = buffer.pop_largest(room)
            if document is None:
                if not crop:
                    break
                document = buffer.pop_shortest()
            taken = min(length(document), room)
            row.append((document, taken))
            room -= taken
        if not row or (crop and room):
            return
        yield row


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _finished(path: Path, log) -> bool:
    manifest = read_json(path / MANIFEST)
    if manifest:
        log(f"packed rows: {manifest['rows']:,} at hand in {path.name}")
    return bool(manifest)


# ------------------------------------------------------------------------------------------------ documents


def pack_documents(
    documents,
    tok,
    seq_len: int,
    cache: Path,
    *,
    split: str,
    buffer: int = 1000,
    max_tokens: int | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """The folder of rows of the documents' `split` (train or val), packed now if it is not there.

    max_tokens stops after so many tokens of rows. UserError where the split does not fill a single row.
    """
    key = fingerprint([VERSION, documents.key, split, tok.hash, seq_len, buffer, max_tokens])
    path = Path(cache) / f"{split}-{key}"
    if _finished(path, log):
        return path
    began, row_len = time.perf_counter(), seq_len + 1
    counts = {"tokenizer": tok.hash, "documents": 0, "tokens": 0, "tokens_cropped": 0}

    def tokenized():
        for texts in _batches(getattr(documents, split)(), REFILL):
            yield [np.asarray([tok.bos, *ids], np.uint16) for ids in tok.encode_batch(texts)]

    def rows():
        limit = None if max_tokens is None else max(1, max_tokens // seq_len)
        packed = best_fit(tokenized(), row_len, buffer, crop=True)
        for pieces in itertools.islice(packed, limit):
            counts["documents"] += len(pieces)
            counts["tokens"] += row_len
            counts["tokens_cropped"] += sum(len(d) - taken for d, taken in pieces)
            yield (np.concatenate([d[:taken] for d, taken in pieces]),)

    manifest = write_packed(path, rows(), row_len, counts)
    if not manifest["rows"]:
        raise UserError(
            f"the {split} documents do not fill one row of {row_len} tokens; give more text or a smaller "
            "model.sequence_len"
        )
    cropped = counts["tokens_cropped"] / (counts["tokens"] + counts["tokens_cropped"])
    log(
        f"packed rows: {manifest['rows']:,} of {row_len} from {counts['documents']:,} {split} documents, "
        f"{100 * cropped:.1f} % of tokens cropped, {time.perf_counter() - began:.1f} s"
    )
    return path


# --------------------------------------------------------------------------------------------- conversations


def pack_conversations(
    mixture,
    tok,
    seq_len: int,
    cache: Path,
    *,
    all_targets: bool,
    key,
    max_rows: int | None = None,
    buffer: int = 200,
    log: Callable[[str], None] = print,
) -> Path:
    """The folder of rows of a mixture's conversations, with masks of what is a target; packed now if not there.

    all_targets: every token is a target, not the assistant's alone. `key` (plain data) names the mixture's contents.
    A conversation longer than a row is cropped to it; one that then has no target is dropped; both are counted. So no
    conversation can block the buffer and no row is without targets.
    """
    path = Path(cache) / f"chat-{fingerprint([VERSION, key, tok.hash, seq_len, all_targets, max_rows, buffer])}"
    if _finished(path, log):
        return path
    from tokenizer.chat import render

    began, row_len = time.perf_counter(), seq_len + 1
    counts = {"tokenizer": tok.hash, "conversations": 0, "cropped": 0, "dropped": 0, "tokens": 0, "targets": 0}

    def rendered():
        for batch in _batches(mixture, REFILL):
            out = []
            for conversation in batch:
                ids, mask = render(tok, conversation)
                counts["cropped"] += len(ids) > row_len
                ids, mask = np.asarray(ids[:row_len], np.uint16), np.asarray(mask[:row_len], bool)
                if mask[1:].any():
                    out.append((ids, np.ones_like(mask) if all_targets else mask))
                else:
                    counts["dropped"] += 1
            yield out

    def rows():
        packed = best_fit(rendered(), row_len, buffer, crop=False, length=lambda c: len(c[0]))
        for pieces in itertools.islice(packed, max_rows):
            ids = np.concatenate([c[0] for c, _ in pieces])
            mask = np.concatenate([c[1] for c, _ in pieces])
            counts["conversations"] += len(pieces)
            counts["tokens"] += len(ids)
            counts["targets"] += int(mask[1:].sum())
            pad = (0, row_len - len(ids))
            yield np.pad(ids, pad, constant_values=tok.bos), np.pad(mask, pad)

    manifest = write_packed(path, rows(), row_len, counts)
    if not manifest["rows"]:
        raise UserError("the mixture of conversations is empty; set data.dir, or leave the mixture to its default")
    full = counts["tokens"] / (manifest["rows"] * row_len)
    log(
        f"packed rows: {manifest['rows']:,} of {row_len} from {counts['conversations']:,} conversations, "
        f"{100 * full:.1f} % full, {counts['cropped']} cropped, {counts['dropped']} dropped, "
        f"{time.perf_counter() - began:.1f} s"
    )
    return path

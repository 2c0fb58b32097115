"""Packing documents and conversations into rows of T + 1 tokens by best fit.

Every row starts with <|bos|>. Where no document fits what is left of a row, a pretraining row is filled with the
beginning of the shortest one, and a row of conversations is padded. The rest of a cropped document is dropped: about a
third of all tokens at a context of 2048. In exchange every token sees its document from the start. Where more
rows are wanted, what was cropped makes rows of its own (packer.py).
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_jax.config import RunConfig, fingerprint
from nanochat_jax.data import packed
from nanochat_jax.data.fit import best_fit
from nanochat_jax.data.packed import PackedDataset, dtype_of, write_packed
from nanochat_jax.data.packer import Job, Packer, pack
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.processes import cores
from tokenizer.chat import render_batch

VERSION = 4  # of what is packed: part of the cache's key
BATCH = 128  # conversations rendered at a time; the rows depend on it
BUFFER = 200  # conversations that a row is chosen from; the rows depend on it


def spare_cores() -> int:
    """Cores that this process may use, less one for itself; at least 1."""
    return max(cores() - 1, 1)


def pack_split(
    config: RunConfig,
    documents,
    tok,
    cache_dir: Path,
    split: str,
    *,
    rows: int | None = None,
    log: Callable[[str], None] = print,
) -> PackedDataset:
    """Rows of the documents' `split` (train or val), up to `rows`, data.max_train_tokens or base.eval_tokens. Returns
    immediately: another process packs what is missing, or goes on from what is there. Closing the dataset stops it.

    With data.pack_workers=0 everything happens here, before this returns. UserError, here or from the dataset, where
    the split does not fill a row or cannot be fetched, or the rows cannot be written.
    """
    length, buffer, workers = config.model.sequence_len, config.data.pack_buffer, config.data.pack_workers
    tokens = config.data.max_train_tokens if split == "train" else config.base.eval_tokens
    limits = [rows, None if tokens is None else max(1, tokens // length)]
    goal = min((n for n in limits if n is not None), default=None)
    key = fingerprint([VERSION, packed.SHARD_ROWS, documents.key, split, tok.hash, length, buffer])
    folder = Path(cache_dir) / "packed" / f"{split}-{key}"
    job = Job(folder, documents, split, tok, length + 1, buffer, goal, packed.SHARD_ROWS)
    packer = None
    if manifest := job.finished():
        log(f"packed rows: {manifest['rows']:,} at hand in {folder.name}")
    elif workers == 0:
        for line in pack(job, threads=1):
            log(line)
    else:
        packer = Packer(job, workers or spare_cores(), log)
    return PackedDataset(folder, limit=goal, packer=packer)


def pack_conversations(
    mixture,
    tok,
    seq_len: int,
    cache: Path,
    *,
    all_targets: bool,
    key,
    max_rows: int | None = None,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> PackedDataset:
    """Rows of a mixture's conversations, with masks of what is a target; packed now if they are not there.

    all_targets: every token is a target, not the assistant's alone. `key` (plain data) names the mixture's contents.
    A conversation longer than a row is cropped to it, and dropped if it then has no target; both are counted. So none
    can block the buffer, and no row is without targets. workers: threads that tokenize; None is one for each core but
    one, and 0 is one.
    """
    path = Path(cache) / f"chat-{fingerprint([VERSION, key, tok.hash, seq_len, all_targets, max_rows, BUFFER])}"
    if manifest := read_json(path / packed.MANIFEST):
        log(f"packed rows: {manifest['rows']:,} at hand in {path.name}")
        return PackedDataset(path)
    began, row_len, dtype = time.perf_counter(), seq_len + 1, dtype_of(tok)
    counts = {"tokenizer": tok.hash, "conversations": 0, "cropped": 0, "dropped": 0, "tokens": 0, "targets": 0}
    threads = spare_cores() if workers is None else max(workers, 1)

    def rendered():
        conversations = iter(mixture)
        while batch := render_batch(tok, list(itertools.islice(conversations, BATCH)), threads):
            cropped = [(np.array(i[:row_len], dtype), np.array(m[:row_len], bool)) for i, m in batch]
            kept = [(ids, np.ones_like(mask) if all_targets else mask) for ids, mask in cropped if mask[1:].any()]
            counts["cropped"] += sum(len(ids) > row_len for ids, _ in batch)
            counts["dropped"] += len(batch) - len(kept)
            yield kept

    def rows():
        made = best_fit(rendered(), row_len, BUFFER, crop=False, length=lambda c: len(c[0]))
        for pieces in itertools.islice(made, max_rows):
            ids, mask = (np.concatenate(arrays) for arrays in zip(*(conversation for conversation, _ in pieces)))
            counts["conversations"] += len(pieces)
            counts["tokens"] += len(ids)
            counts["targets"] += int(mask[1:].sum())
            pad = (0, row_len - len(ids))
            yield np.pad(ids, pad, constant_values=tok.bos), np.pad(mask, pad)
        if not counts["conversations"]:
            raise UserError(_why_empty(counts["dropped"], seq_len))

    manifest = write_packed(path, rows(), row_len, counts, dtype)
    full = counts["tokens"] / (manifest["rows"] * row_len)
    log(
        f"packed rows: {manifest['rows']:,} of {row_len} from {counts['conversations']:,} conversations, "
        f"{100 * full:.1f} % full, {counts['cropped']} cropped, "
        f"{counts['dropped']} dropped (a question longer than a row), {time.perf_counter() - began:.1f} s"
    )
    return PackedDataset(path)


def _why_empty(dropped: int, seq_len: int) -> str:
    if dropped:
        return f"each of {dropped:,} conversations has a question longer than model.sequence_len, {seq_len} tokens"
    return "the mixture of conversations is empty: its tasks have no rows in this split; give them more, or other tasks"

"""Bits per byte on packed validation rows: a loss that does not depend on the vocabulary.

The nats of all targets that stand for text, over ln 2 times the bytes that they stand for. Specials stand for none and
do not count, nor do positions that a mask leaves out. Beside it a floor to beat: the entropy of the bytes of the same
text taken one by one, which is what a model of byte frequencies alone would score.
"""

import math
from pathlib import Path

import numpy as np

from evals import records
from evals.scoring import Scorer
from evals.significance import ratio_error


def evaluate_bpb(scorer: Scorer, dataset, tokenizer, max_tokens: int | None = None, path: Path | None = None) -> dict:
    """{"bpb", "stderr", "byte_unigram", "below_unigram", "loss", "tokens", "bytes", "rows"} of `dataset`'s first rows.

    dataset: len and rows(indices) -> {"tokens": (n, T + 1), "mask": (n, T + 1) or None}. max_tokens bounds the rows.
    bpb and byte_unigram are in bits per byte, below_unigram the share by which bpb is smaller, loss in nats per token.
    stderr: of bpb, rows taken as independent draws of such text. What each of them cost goes to the file `path`.
    """
    table = np.asarray(tokenizer.token_bytes(), np.int64)
    counts = np.zeros(len(table), np.int64)
    n_rows, row, nats, costs = len(dataset), scorer.batch_rows, 0.0, []
    if n_rows and max_tokens is not None:
        width = dataset.rows([0])["tokens"].shape[1] - 1
        n_rows = min(n_rows, max(1, max_tokens // width))
    for at in range(0, n_rows, row):
        got = dataset.rows(list(range(at, min(at + row, n_rows))))
        ids = np.asarray(got["tokens"]).astype(np.int32)
        targets = ids[:, 1:].copy()
        if got.get("mask") is not None:
            targets[np.asarray(got["mask"])[:, 1:] == 0] = -1
        spare = ((0, row - len(ids)), (0, 0))  # the last batch is filled up, so that one program serves all
        targets = np.pad(targets, spare, constant_values=-1)
        losses = scorer.row_losses(np.pad(ids[:, :-1], spare), targets)
        sizes = np.where(targets >= 0, table[np.maximum(targets, 0)], 0)  # bytes that each target stands for
        text = sizes > 0
        nats += float(losses[text].sum(dtype=np.float64))
        bits = np.where(text, losses, 0).sum(axis=1, dtype=np.float64) / math.log(2)
        for r, (row_bits, row_bytes) in enumerate(zip(bits[: len(ids)], sizes.sum(axis=1))):
            id = records.content_id(ids[r].tobytes())
            costs.append({"index": at + r, "id": id, "bits": float(row_bits), "bytes": int(row_bytes)})
        counts += np.bincount(targets[text], minlength=len(table))
    if path is not None:
        records.write(path, costs)
    n_bytes, n_tokens = int(counts @ table), int(counts.sum())
    if not n_bytes:
        unknown = ("bpb", "stderr", "byte_unigram", "below_unigram", "loss")
        return dict.fromkeys(unknown) | dict.fromkeys(("tokens", "bytes", "rows"), 0)
    bpb = nats / (math.log(2) * n_bytes)
    unigram = byte_entropy(byte_histogram(tokenizer, counts))
    return {
        "bpb": bpb,
        "stderr": ratio_error(*(np.array([c[name] for c in costs]) for name in ("bits", "bytes"))),
        "byte_unigram": unigram,
        "below_unigram": 1 - bpb / unigram if unigram else None,
        "loss": nats / n_tokens,
        "tokens": n_tokens,
        "bytes": n_bytes,
        "rows": n_rows,
    }


def byte_histogram(tokenizer, token_counts: np.ndarray) -> np.ndarray:
    """(256,) how often each byte stands in a text that has `token_counts` (V,) of each token."""
    histogram = np.zeros(256, np.int64)
    for id in np.flatnonzero(token_counts):
        raw = np.frombuffer(tokenizer.decode_bytes([int(id)]), np.uint8)
        histogram += token_counts[id] * np.bincount(raw, minlength=256)
    return histogram


def byte_entropy(histogram: np.ndarray) -> float:
    """Bits per byte of a text of these byte counts, each byte coded by its frequency alone (Shannon 1948)."""
    p = histogram[histogram > 0] / histogram.sum()
    return float(-(p * np.log2(p)).sum())

"""Bits per byte on packed validation rows: a loss that does not depend on the vocabulary.

The nats of all targets that stand for text, over ln 2 times the bytes that they stand for; specials stand for none and
do not count. Beside it a floor to beat: the entropy of the bytes of the same text taken one by one, which is what a
model of byte frequencies alone would score.
"""

import math
from pathlib import Path

import numpy as np

from evals import records
from evals.scoring import Scorer
from evals.significance import ratio_error


def evaluate_bpb(scorer: Scorer, dataset, tokenizer, path: Path | None = None) -> dict:
    """{"bpb", "stderr", "byte_unigram", "below_unigram", "loss", "tokens", "bytes", "rows"} of the rows of `dataset`.

    dataset: len and rows(indices) -> {"tokens": (n, T + 1)}. bpb and byte_unigram are in bits per byte, below_unigram
    the share by which bpb is smaller, loss in nats per token. stderr: of bpb, rows taken as independent draws of such
    text. What each row cost goes to the file `path`.
    """
    table = np.asarray(tokenizer.token_bytes(), np.int64)
    counts = np.zeros(len(table), np.int64)
    n_rows, nats, costs = len(dataset), 0.0, []
    for at in range(0, n_rows, scorer.batch_rows):
        ids = np.asarray(dataset.rows(list(range(at, min(at + scorer.batch_rows, n_rows))))["tokens"]).astype(np.int32)
        targets = ids[:, 1:]
        losses = scorer.row_losses(ids[:, :-1], targets)
        sizes = table[targets]  # bytes that each target stands for
        text = sizes > 0
        nats += float(losses[text].sum(dtype=np.float64))
        bits = np.where(text, losses, 0).sum(axis=1, dtype=np.float64) / math.log(2)
        for i, (row, row_bits, row_bytes) in enumerate(zip(ids, bits, sizes.sum(axis=1)), at):
            id = records.content_id(row.tobytes())
            costs.append({"index": i, "id": id, "bits": float(row_bits), "bytes": int(row_bytes)})
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

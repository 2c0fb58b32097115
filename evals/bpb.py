"""Bits per byte on packed validation rows: a loss that does not depend on the vocabulary.

The nats of all targets that stand for text, over ln 2 times the bytes that they stand for; specials stand for none and
do not count.
"""

import math
from pathlib import Path

import numpy as np

from evals import records
from evals.scoring import Scorer
from evals.significance import ratio_error


def evaluate_bpb(scorer: Scorer, dataset, tokenizer, path: Path | None = None) -> dict:
    """{"bpb", "stderr", "loss", "tokens", "bytes", "rows"} of the rows of `dataset`.

    dataset: len and rows(indices) -> {"tokens": (n, T + 1)}. bpb is in bits per byte, loss in nats per token. stderr:
    of bpb, rows taken as independent draws of such text. What each row cost goes to the file `path`.
    """
    table = np.asarray(tokenizer.token_bytes(), np.int64)
    n_rows, n_tokens, n_bytes, nats, costs = len(dataset), 0, 0, 0.0, []
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
        n_tokens, n_bytes = n_tokens + int(text.sum()), n_bytes + int(sizes.sum())
    if path is not None:
        records.write(path, costs)
    if not n_bytes:
        return dict.fromkeys(("bpb", "stderr", "loss")) | dict.fromkeys(("tokens", "bytes", "rows"), 0)
    return {
        "bpb": nats / (math.log(2) * n_bytes),
        "stderr": ratio_error(*(np.array([c[name] for c in costs]) for name in ("bits", "bytes"))),
        "loss": nats / n_tokens,
        "tokens": n_tokens,
        "bytes": n_bytes,
        "rows": n_rows,
    }

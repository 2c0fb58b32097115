"""Rows by step: what comes at a step is a function of (seed, step) alone, so resuming costs nothing."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import grain
import numpy as np

from nanochat_jax.data.packed import PackedDataset


class _Rows:
    """PackedDataset as Grain reads it: one row by index."""

    def __init__(self, dataset: PackedDataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        row = self._dataset.rows([index])
        return {k: v[0] for k, v in row.items() if v is not None}


def _collate(rows: list[dict]) -> dict[str, np.ndarray]:
    """Rows of T + 1 as tokens and targets (R, T) int32; a target that the mask leaves out is -1."""
    ids = np.stack([row["tokens"] for row in rows]).astype(np.int32)
    targets = ids[:, 1:].copy()
    if "mask" in rows[0]:
        targets[~np.stack([row["mask"] for row in rows])[:, 1:]] = -1
    return {"tokens": ids[:, :-1], "targets": targets}


class Loader:
    """Batches of `batch_rows` rows, shuffled anew in every epoch; the next one is made while the step runs."""

    def __init__(self, dataset: PackedDataset, *, seed: int, batch_rows: int):
        rows = grain.MapDataset.source(_Rows(dataset)).seed(seed).shuffle()
        self._batches = rows.repeat().batch(batch_rows, batch_fn=_collate)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: dict[int, Future] = {}

    def at(self, step: int) -> dict[str, np.ndarray]:
        """{"tokens", "targets"}, each (batch_rows, T) int32."""
        future = self._ahead.pop(step, None) or self._pool.submit(self._batches.__getitem__, step)
        self._ahead = {step + 1: self._pool.submit(self._batches.__getitem__, step + 1)}
        return future.result()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc) -> None:
        self._pool.shutdown(cancel_futures=True)

"""Packed rows on disk: token ids that fit 16 bits, in shards with a manifest, addressed by index.

A dataset is a folder of `tokens_00000.npy`, ... (rows, T + 1) uint16, for conversations also `mask_00000.npy`, ...
(rows, T + 1) bool, and `manifest.json`, which is written last: a folder without it is not a dataset.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json

MANIFEST = "manifest.json"
SHARD_ROWS = 16_384


class PackedDataset:
    """len, and rows by index. UserError where the folder is not whole."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST)
        if self.manifest is None:
            raise UserError(f"{path} holds no packed rows (it has no {MANIFEST})")
        self._shards = {
            name: [self._open(name, i) for i in range(len(self.manifest["shards"]))] for name in self._names
        }
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.manifest["shards"]])

    @property
    def _names(self) -> list[str]:
        return ["tokens", "mask"] if self.manifest["masked"] else ["tokens"]

    def _open(self, name: str, i: int) -> np.ndarray:
        path = self.path / f"{name}_{i:05d}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError):
            raise UserError(f"{path} is missing or damaged; remove {self.path} to have it packed anew") from None
        if len(array) != self.manifest["shards"][i]["rows"]:
            raise UserError(f"{path} has lost rows; remove {self.path} to have it packed anew")
        return array

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray | None]:
        """{"tokens": (n, T + 1) uint16, "mask": (n, T + 1) bool or None}."""
        indices = np.asarray(indices)
        which = np.searchsorted(self._starts, indices, side="right") - 1
        out: dict[str, np.ndarray | None] = {"mask": None}
        for name in self._names:
            out[name] = np.stack([self._shards[name][s][i - self._starts[s]] for s, i in zip(which, indices)])
        return out

    def verify(self) -> None:
        """UserError where a shard's bytes are not those that were written."""
        for i, shard in enumerate(self.manifest["shards"]):
            if _checksum([self._shards[name][i] for name in self._names]) != shard["checksum"]:
                raise UserError(f"shard {i} of {self.path} is damaged; remove the folder to have it packed anew")


def _checksum(arrays: Iterable[np.ndarray]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), value)
    return value


def write_packed(path: Path, rows: Iterable[tuple], row_len: int, counts: dict) -> dict:
    """Writes rows (tokens, or (tokens, mask)) of row_len as a dataset at `path` and returns its manifest.

    `counts` is read when the rows are through, so that what makes them can count. The folder appears whole or not at
    all, also where two processes pack the same.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards, pending, masked = [], [], False

    def flush():
        arrays = [np.asarray([row[0] for row in pending], np.uint16).reshape(-1, row_len)]
        names = ["tokens"]
        if masked:
            arrays.append(np.asarray([row[1] for row in pending], bool).reshape(-1, row_len))
            names.append("mask")
        for name, array in zip(names, arrays):
            np.save(part / f"{name}_{len(shards):05d}.npy", array)
        shards.append({"rows": len(pending), "checksum": _checksum(arrays)})
        pending.clear()

    try:
        for row in rows:
            masked = len(row) == 2
            pending.append(row)
            if len(pending) == SHARD_ROWS:
                flush()
        if pending:
            flush()
        manifest = {"row_len": row_len, "masked": masked, "rows": sum(s["rows"] for s in shards)}
        manifest |= {"shards": shards, **counts}
        atomic_write_json(part / MANIFEST, manifest)
        if not (path / MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest

"""Packed rows on disk: token ids in shards with a manifest, addressed by index.

A dataset is a folder of `tokens_00000.npy`, ... (rows, T + 1), uint16 where the vocabulary fits that, else uint32, for
conversations also `mask_00000.npy`, ... (rows, T + 1) bool, and `manifest.json`: what is not in there does not exist.
All shards but the last have `shard_rows` rows, and each has a checksum. A folder may grow while it is read.
"""

import contextlib
import functools
import io
import itertools
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.data.cache import writing
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_bytes, atomic_write_json, part_of, read_json

MANIFEST = "manifest.json"
SHARD_ROWS = 4096
POLL = 0.1  # seconds between two polls of a folder that grows


def dtype_of(tok) -> np.dtype:
    """Of the ids of a tokenizer."""
    return np.dtype(np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)


class PackedDataset(contextlib.AbstractContextManager):
    """Rows by index. With `packer`, which fills the folder meanwhile, rows that are not there yet are waited for.

    limit: only so many rows of the folder count. A shard is read as a whole when it is first touched, and compared
    with its checksum. UserError where the folder holds no rows or is damaged.
    """

    def __init__(self, path: str | Path, *, limit: int | None = None, packer=None):
        self.path, self.limit, self.packer = Path(path), limit, packer
        self._shard = functools.cache(self._open)
        self.manifest: dict = {}
        self.refresh()
        if not self.manifest and packer is None:
            raise UserError(f"{path} holds no packed rows (it has no {MANIFEST})")

    def refresh(self) -> None:
        """Takes in what has been packed since."""
        found = read_json(self.path / MANIFEST)
        if found and found["rows"] >= self.manifest.get("rows", 0):
            self.manifest = found

    @property
    def complete(self) -> bool:
        return bool(self.manifest) and (self.manifest["complete"] or self.available() == self.limit)

    @property
    def shard_rows(self) -> int:
        return self.manifest["shard_rows"] if self.manifest else SHARD_ROWS

    def available(self) -> int:
        rows = self.manifest.get("rows", 0)
        return rows if self.limit is None else min(rows, self.limit)

    def wait_for(self, rows: int, stop: threading.Event | None = None) -> int:
        """How many rows are there, once they are `rows` or all of them.

        UserError where packing failed, or where nobody packs. `stop` ends the wait early.
        """
        stop = stop or threading.Event()
        while not stop.is_set() and self.available() < rows and not self.complete:
            working = self.packer is not None and self.packer.working()  # asked first: what it wrote last is then seen
            self.refresh()
            if self.available() < rows and not self.complete:
                if not working:
                    found = f"{self.path} holds {self.available():,} rows"
                    raise UserError(f"{found} and was not packed to its end; start again")
                stop.wait(POLL)
        return self.available()

    def __len__(self) -> int:
        """How many rows there are in all; waits until they are there."""
        return self.wait_for(self.limit or 1 << 62)

    def rows(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens": (n, T + 1) uint16 or uint32, "mask": (n, T + 1) bool where the rows have masks}. IndexError beyond
        the last row."""
        indices = np.asarray(indices, np.int64)
        last = int(indices.max(initial=-1))
        if indices.min(initial=0) < 0 or (last >= self.available() and last >= self.wait_for(last + 1)):
            raise IndexError(f"{self.path} has no such row among {indices}")
        which, within = np.divmod(indices, self.shard_rows)
        out = {}
        for name, dtype in self._arrays():
            out[name] = np.empty((len(indices), self.manifest["row_len"]), dtype)
            for shard in np.unique(which):
                mine = which == shard
                out[name][mine] = self._shard(int(shard))[name][within[mine]]
        return out

    def touch(self, first: int, end: int) -> None:
        """Reads and checks the shards of the rows from `first` to before `end`, as far as they are there."""
        for shard in range(first // self.shard_rows, -(-min(end, self.available()) // self.shard_rows)):
            self._shard(shard)

    def _arrays(self) -> list[tuple[str, str]]:
        return [("tokens", self.manifest["dtype"]), *([("mask", "bool")] if self.manifest["masked"] else [])]

    def _open(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, mapped into memory and checked."""
        shard = self.manifest["shards"][i]
        try:
            arrays = {name: np.load(self.path / _file(name, i), mmap_mode="r") for name, _ in self._arrays()}
        except (FileNotFoundError, ValueError, EOFError):
            arrays = {}
        shape = shard["rows"], self.manifest["row_len"]
        written = [(shape, np.dtype(dtype)) for _, dtype in self._arrays()]
        found = [(array.shape, array.dtype) for array in arrays.values()]
        if found != written or _checksum(arrays.values()) != shard["checksum"]:
            raise UserError(f"shard {i} of {self.path} is damaged or missing; remove the folder to have it packed anew")
        return arrays

    def close(self) -> None:
        """Stops the packer, if there is one. Another one resumes there."""
        if self.packer is not None:
            self.packer.close()

    def __exit__(self, *exc) -> None:
        self.close()


def _file(name: str, i: int) -> str:
    return f"{name}_{i:05d}.npy"


def _checksum(arrays: Iterable[np.ndarray]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def write_arrays(path: Path, save: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> None:
    """What np.save or np.savez makes of arrays, whole or not at all."""
    content = io.BytesIO()  # given a file, np.save does not say that the disk is full
    save(content, *arrays, **named)
    atomic_write_bytes(path, content.getvalue())


def write_shard(folder: Path, i: int, arrays: dict[str, np.ndarray]) -> dict:
    """Writes the arrays of shard `i`; what the manifest says of it."""
    for name, array in arrays.items():
        write_arrays(folder / _file(name, i), np.save, array)
    return {"rows": len(arrays["tokens"]), "checksum": _checksum(arrays.values())}


def write_packed(
    path: Path, rows: Iterable[tuple], row_len: int, counts: dict, dtype: np.dtype | type = np.uint16
) -> dict:
    """Writes rows (tokens, or (tokens, mask)) of row_len as a dataset at `path` and returns its manifest.

    `counts` is read when the rows are through, so that what makes them can count. The folder appears whole or not at
    all, also where two processes pack the same.
    """
    part, rows = part_of(path), iter(rows)
    shards: list[dict] = []
    masked = False
    try:
        with writing(path):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        while chunk := list(itertools.islice(rows, SHARD_ROWS)):
            masked = len(chunk[0]) == 2
            columns = zip(("tokens", "mask"), (dtype, bool), zip(*chunk))
            arrays = {name: np.asarray(values, kind).reshape(-1, row_len) for name, kind, values in columns}
            with writing(path):
                shards.append(write_shard(part, len(shards), arrays))
        manifest = {"row_len": row_len, "dtype": np.dtype(dtype).name, "masked": masked, "shard_rows": SHARD_ROWS}
        manifest |= {"rows": sum(s["rows"] for s in shards), "complete": True, "shards": shards, **counts}
        with writing(path):
            atomic_write_json(part / MANIFEST, manifest)
            if not (path / MANIFEST).is_file():
                shutil.rmtree(path, ignore_errors=True)
                os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest

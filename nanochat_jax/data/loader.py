"""Batches by step: what comes at a step is a function of (seed, step) alone, so resuming costs nothing.

Rows are shuffled in windows that grow as 1, 1, 2, 4, 8, ... shards: training begins when the first shard is packed, and
never waits if packing is at least twice as fast as training. From the second epoch on all rows are shuffled together.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import grain
import jax
import numpy as np

from nanochat_jax.data.packed import PackedDataset

MAX_WINDOW_SHARDS = 64  # shards of a window
THREADS = 2  # that make batches
PREFETCH = 2  # batches that are made ahead
ENDLESS = 1 << 40  # steps
CACHED_PERMUTATIONS = 3  # permutations that are cached: steps ahead may be in the next window already


class RowOrder:
    """Which row comes at which position: every row once an epoch.

    `count(n)` says how many rows there are, and blocks until there are n or packing has ended. What comes at a position
    depends on the seed only; on the number of all rows only in the window in which they end, and in the epochs after
    the first.
    """

    def __init__(self, seed: int, shard_rows: int, count: Callable[[int], int]):
        self._seed, self._shard_rows, self._count = seed, shard_rows, count
        self._permutation = functools.lru_cache(CACHED_PERMUTATIONS)(self._permuted)

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the rows at positions, both (n,) int64."""
        positions = np.asarray(positions, np.int64)
        out, left = np.empty_like(positions), np.ones(len(positions), bool)
        while left.any():
            epoch, window, start, end = self.window_of(int(positions[left].min()))
            mine = left & (positions < end)
            order = self._permutation(epoch, window, end - start)
            out[mine] = order[positions[mine] - start] + (0 if epoch else start)
            left &= ~mine
        return out

    def window_of(self, position: int) -> tuple[int, int, int, int]:
        """(epoch, window, its first position, the position after its last)."""
        start = 0
        for window in itertools.count():
            end = start + min(2 ** max(window - 1, 0), MAX_WINDOW_SHARDS) * self._shard_rows
            if position < end:
                break
            start = end
        rows = self._count(end)
        if position < rows:
            return 0, window, start, min(end, rows)
        epoch = position // rows
        return epoch, 0, epoch * rows, (epoch + 1) * rows

    def _permuted(self, epoch: int, window: int, rows: int) -> np.ndarray:
        seed = np.random.SeedSequence([self._seed, epoch, window])
        return np.random.Generator(np.random.Philox(seed)).permutation(rows)


class Loader(AbstractContextManager):
    """{"tokens", "targets"} of each step, (accumulation, rows, T) int32 as `sharding` spreads them over the devices.

    A target that the rows' mask leaves out is -1. Every process reads only rows that its own devices hold. The next
    steps' batches are made, and brought to the devices, while a step runs.
    """

    def __init__(self, dataset: PackedDataset, *, seed: int, accumulation: int, rows: int, sharding):
        self._dataset, self._accumulation, self._rows, self._sharding = dataset, accumulation, rows, sharding
        self._closed = threading.Event()
        dataset.wait_for(1)  # from here on it is known how large a shard is
        self._order = RowOrder(seed, dataset.shard_rows, self._count)
        self._iterator: grain.DatasetIterator | None = None
        self._next = 0

    def at(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step; the steps that follow it are then made ahead. UserError where rows are damaged."""
        if self._iterator is None or step != self._next:
            self._stop_ahead()
            options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)
            batches = grain.MapDataset.range(step, ENDLESS).map(self._make)
            self._iterator = iter(batches.to_iter_dataset(options))
        try:
            batch = next(self._iterator)
        except BaseException:
            self._stop_ahead()  # its place is not certain any more
            raise
        self._next = step + 1
        return batch

    def _count(self, rows: int) -> int:
        found = self._dataset.wait_for(rows, self._closed)
        if self._closed.is_set():
            raise RuntimeError("the loader was closed")
        return found

    def _make(self, step: int) -> dict[str, jax.Array]:
        accumulation, rows = self._accumulation, self._rows
        positions = step * accumulation * rows + np.arange(accumulation * rows).reshape(accumulation, rows)
        parts: dict[tuple, dict[str, np.ndarray]] = {}  # devices that differ in other axes hold the same rows

        def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
            where = *index[0].indices(accumulation), *index[1].indices(rows)
            if where not in parts:
                parts[where] = self._read(positions[index[:2]])
            return parts[where][name][..., index[2]]

        shape = accumulation, rows, self._dataset.manifest["row_len"] - 1
        batch: dict[str, jax.Array] = {
            name: jax.make_array_from_callback(shape, self._sharding, functools.partial(part, name), dtype=np.int32)
            for name in ("tokens", "targets")
        }
        self._check_ahead((step + 1) * accumulation * rows)
        return batch

    def _read(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens", "targets"}, (*positions.shape, T) int32."""
        found = self._dataset.rows(self._order.rows_at(positions.ravel()))
        ids = found["tokens"].reshape(*positions.shape, -1)
        targets = ids[..., 1:].astype(np.int32)
        if "mask" in found:
            targets[~found["mask"].reshape(ids.shape)[..., 1:]] = -1
        return {"tokens": ids[..., :-1].astype(np.int32), "targets": targets}

    def _check_ahead(self, position: int) -> None:
        """Reads as large a share of the next window's shards as is done of this window, rather than all of them when
        the next window begins."""
        epoch, _, _, end = self._order.window_of(position - 1)
        if epoch == 0:
            self._dataset.touch(end, position + min(position, MAX_WINDOW_SHARDS * self._dataset.shard_rows))

    def _stop_ahead(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def close(self) -> None:
        self._closed.set()
        self._stop_ahead()

    def __exit__(self, *exc) -> None:
        self.close()

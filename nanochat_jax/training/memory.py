"""Whether a step fits a device, by the compiler's own analysis of the compiled step, before anything runs."""

import bisect
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding

MARGIN = 0.95  # of a device's memory may be planned; the rest is for evaluations, libraries and fragments


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes on each device while a compiled program runs: arguments, results in buffers of their own, temporaries."""
    a: Any = compiled.memory_analysis()
    arrays = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes
    return arrays + a.temp_size_in_bytes + a.generated_code_size_in_bytes


def device_bytes() -> int:
    """Bytes that may be planned on one device of this process; CPU devices share the memory of the host or cgroup."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(MARGIN * stats["bytes_limit"])
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no such limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(MARGIN * total) // jax.local_device_count()


def held_bytes(tree) -> int:
    """Bytes that the arrays of a pytree take on the first device of this process."""
    first = jax.local_devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


def rows_per_device(name: str, batch_tokens: int, sequence_len: int, mesh: jax.sharding.Mesh) -> int:
    """Rows of a batch on each data-parallel device. UserError where they cannot be shared evenly."""
    rows, shares = batch_tokens // sequence_len, sharding.data_parallel(mesh)
    if rows < 1 or rows % shares:
        raise UserError(
            f"{name}: a batch of {batch_tokens} tokens is {rows} rows of {sequence_len}, which cannot be shared by "
            f"{shares} data-parallel devices; set {name}.batch_tokens to a multiple of {shares * sequence_len}"
        )
    return rows // shares


def micro_batches(rows: int, at_most: int) -> list[int]:
    """The sizes up to `at_most` that divide a device's `rows` of a batch, descending."""
    return [m for m in range(min(at_most, rows), 0, -1) if rows % m == 0]


def cheapest_that_fits(
    levels: Sequence[str], sizes: list[int], needed: Callable[[str, int], int], limit: int, name: str
) -> tuple[str, int]:
    """The first level of `remat` with which the largest micro-batch fits, and that; where none is, the last level and
    the largest that fits then. `needed(level, size)` compiles. UserError where none does."""
    level = next((one for one in levels if needed(one, sizes[0]) <= limit), levels[-1])
    return level, largest_that_fits(sizes, lambda size: needed(level, size), limit, name)


def largest_that_fits(sizes: list[int], needed: Callable[[int], int], limit: int, name: str) -> int:
    """The largest of descending micro-batches whose step needs at most `limit` bytes; UserError where none does.

    `needed(m)` compiles: the largest is tried first, as it mostly fits, and then a binary search among the others.
    """

    def fits(size: int) -> bool:
        return needed(size) <= limit

    first = 0 if fits(sizes[0]) else bisect.bisect_left(sizes, True, lo=1, key=fits)
    if first < len(sizes):
        return sizes[first]
    raise UserError(
        f"{name}: a step needs {needed(sizes[-1]) / 1e9:.1f} GB on each device even with {sizes[-1]} rows, and there "
        f"are {limit / 1e9:.1f} GB; keep less (remat=auto, optimizer_state=light), take more devices, which "
        "share the state, or a smaller model.depth or model.sequence_len"
    )

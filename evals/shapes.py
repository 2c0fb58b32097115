"""The few shapes that questions of any length are padded to, so that few programs are compiled."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanochat_jax import devices

SHORTEST = 16  # tokens of the shortest bucket of prefixes, and of the least step from one to the next


class Fineness(NamedTuple):
    tokens: int  # of a batch on each device
    steps: int  # buckets of prefixes in each doubling of their length
    head: int  # targets whose logits are in memory at a time


# A CPU is fastest where a batch fits its caches, and waits longer for what fills rows up than for compiling. On an
# accelerator the keys and values of a batch count: 1.2 GB at depth 24 in bfloat16, beside all that training holds.
CPU, ACCELERATOR = Fineness(2048, 4, 64), Fineness(8192, 1, 512)


def fineness() -> Fineness:
    return CPU if devices.platform() == "cpu" else ACCELERATOR


def power_of_four(n: int) -> int:
    """The next one, not below n >= 1."""
    return 1 << 2 * -(-(n - 1).bit_length() // 2)


def prefix_bucket(length: int, steps: int) -> int:
    """The padded length of a prefix: 16, 32, 64, ... with `steps` of equal size, at least 16, in each doubling."""
    size = SHORTEST
    while 2 * size < length:
        size *= 2
    step = max(SHORTEST, size // steps)
    return max(size, -(-length // step) * step)


def branch_bucket(size: int, steps: int) -> int:
    """The padded number of branch tokens, or of targets: 1, 4, 16, and then powers of four, or of two if fine."""
    return power_of_four(size) if steps == 1 or size <= SHORTEST else 1 << (size - 1).bit_length()


def stack(lists: list[Sequence[int]], shape: tuple[int, int], fill: int) -> np.ndarray:
    """int32 of a shape, each list at the left of its row."""
    out = np.full(shape, fill, np.int32)
    for row, values in zip(out, lists):
        row[: len(values)] = values
    return out

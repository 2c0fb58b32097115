"""A mixture of tasks' conversations in one deterministic order."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Mixture:
    """Conversations of (task, times) pairs, shuffled together.

    times > 0 repeats all of a task's conversations; times < 0 takes -times of them, at random.
    """

    def __init__(self, tasks: Sequence[tuple[Any, int]], seed: int):
        rng = np.random.default_rng([seed, len(tasks)])
        self._tasks, places = [task for task, _ in tasks], []
        for which, (task, times) in enumerate(tasks):
            chosen = np.tile(np.arange(len(task)), times) if times > 0 else rng.permutation(len(task))[:-times]
            places.append(np.stack([np.full(len(chosen), which), chosen], axis=1))
        joined = np.concatenate(places) if places else np.zeros((0, 2), int)
        self._order = rng.permutation(joined)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[dict]:
        for which, i in self._order:
            yield self._tasks[which][int(i)]

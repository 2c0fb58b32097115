"""What can be seen going wrong in training: a loss that is not finite, a loss spike, a stall.

The first two are a function of the records so far, so that a resumed run raises the same alarms again.
"""

import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

WINDOW = 64  # losses that a new one is compared with
LEAST = 16  # with fewer there is nothing to compare with
TIMES = 8  # deviations above the median
FLOOR = 0.005  # of the median: what a deviation is taken for at least
IN_A_ROW = 3  # a single batch may be odd

STALL_TIMES, STALL_SECONDS = 20, 60.0  # a step that takes longer than both is taken for a stall


class LossAlarm:
    """Whether a loss is a spike, by a robust rule.

    A loss is high above m + TIMES * max(1.4826 MAD, FLOOR * |m|), where m is the median of the WINDOW losses before it
    and MAD the median of their distances from m (1.4826 MAD estimates the standard deviation of a normal sample and,
    unlike it, does not grow with a few outliers). The IN_A_ROW-th high loss in a row is a spike; the ones after it are
    the same one. High losses enter the window too: where the loss stays high for half of it, that is the new normal.
    """

    def __init__(self, losses: Iterable[float | None] = ()):
        """losses: those before, from the records of the stage."""
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._high = 0
        for loss in losses:
            self.see(math.nan if loss is None else loss)

    def see(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self._limit()
        self._high = self._high + 1 if loss > limit else 0
        self._window.append(loss)
        return (
            f"spike: {IN_A_ROW} losses in a row above {limit:.3f}, now {loss:.3f}" if self._high == IN_A_ROW else None
        )

    def _limit(self) -> float:
        if len(self._window) < LEAST:
            return math.inf
        median = statistics.median(self._window)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self._window)
        return median + TIMES * max(deviation, FLOOR * abs(median))


class StallAlarm:
    """A thread that calls `tell(text)` once where no step has come for STALL_TIMES the median step and `least` seconds.

    The first LEAST steps, which compile, are not watched.
    """

    def __init__(self, tell: Callable[[str], None], least: float = STALL_SECONDS):
        self._tell, self._least = tell, least
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._mark: float | None = None  # when the last step came; None: not known, or already told
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)
        self._thread.start()

    def step(self) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._steps.append(now - self._mark)
        self._mark = now

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What happens in here is no step, and may take its time."""
        self._mark = None
        try:
            yield
        finally:
            self._mark = time.monotonic()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._least / 4):
            mark, steps = self._mark, list(self._steps)
            if mark is None or len(steps) < LEAST:
                continue
            usual, waited = statistics.median(steps), time.monotonic() - mark
            if waited > max(self._least, STALL_TIMES * usual):
                self._mark = None
                self._tell(f"stall: no step for {waited:.0f} s, they take {usual:.1f} s")

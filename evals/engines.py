"""Many requests at once: an engine for each core of a CPU, and one engine elsewhere.

On a CPU, XLA uses one core for most of a decode step: products of few rows are too small to be split, and attention
reads the cache on one core. So every core gets an engine with slots of its own, in a thread, and all share one queue.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from nanochat_jax.engine.engine import Completion, Engine, Request, Ticket
from nanochat_jax.processes import cores

MOST = 8  # engines on a CPU, as each reads all weights for its own rows
ROWS = 8  # of each there: what they hold of a small model stays near its core; 16 were a tenth slower


class Engines:
    """At most `slots` rows of max_len tokens: on a CPU in `count` engines (None: one a core), elsewhere over `mesh`."""

    def __init__(self, model, *, slots: int, max_len: int, tool=None, count: int | None = None, mesh=None):
        self.max_len, how = max_len, {"max_len": max_len, "tool": tool}
        if jax.default_backend() == "cpu":
            count = min(count or min(cores(), MOST), slots)
            how |= {"slots": min(-(-slots // count), ROWS), "one_core": count > 1}
        else:
            count, how = 1, how | {"slots": slots, "mesh": mesh}
        self._engines = [Engine(model, **how) for _ in range(count)]
        for engine in self._engines:
            engine.params, engine.patient = self._engines[0].params, True  # one copy of the parameters serves all

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in the order of the requests. Long prompts go first, so that rows of one batch are of like
        lengths: attention reads as much of the cache for all as the longest needs.
        """
        tickets: dict[int, Ticket] = {}
        waiting = deque(sorted(range(len(requests)), key=lambda i: -len(requests[i].ids)))
        lock, stopped = threading.Lock(), threading.Event()

        def work(engine: Engine) -> None:
            while not stopped.is_set():
                with lock:
                    while waiting and engine.active + engine.queued < engine.slots:
                        i = waiting.popleft()
                        tickets[i] = engine.submit(requests[i])
                if not engine.busy:
                    break
                engine.step()

        with ThreadPoolExecutor(max_workers=len(self._engines)) as pool:
            try:
                list(pool.map(work, self._engines))
            except BaseException:  # Ctrl-C too: the threads would go on to the last request
                stopped.set()
                raise
        return [tickets[i].completion for i in range(len(requests))]

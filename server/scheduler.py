"""One thread owns the engine. Requests come to it through an inbox, and what it makes goes back by callbacks."""

import contextlib
import functools
import itertools
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat_jax.engine.engine import Engine, Event, Request, Ticket
from nanochat_jax.errors import UserError
from server.errors import ApiError, Busy, Stopped

Update = Event | Exception  # what is new of a request, or why nothing will come any more


@dataclass(eq=False)
class Job:
    request: Request
    deliver: Callable[[Update], None]  # called in the engine thread
    ticket: Ticket | None = None
    began: float | None = None  # when its first ids came
    ended: bool = False


class Scheduler:
    """Runs requests until `stop`, in a thread of its own. `submit` and `cancel` may be called from any thread.

    likely: requests such as most will be; what these can need is compiled in another thread, beside requests.
    """

    def __init__(self, engine: Engine, max_waiting: int = 64, likely: Sequence[Request] = ()):
        self.engine = engine
        self.failure: Exception | None = None
        self.compiled = not likely  # what such requests can need
        self._warming = threading.Thread(target=self._warm_up, args=[likely], name="warm-up", daemon=True)
        self._max_waiting = max_waiting
        self._inbox: queue.Queue[Job | None] = queue.Queue()  # None: stop
        self._jobs: dict[Ticket, Job] = {}  # only the engine thread touches it
        self._lock, self._stopping = threading.Lock(), False
        self._unended: set[Job] = set()  # under the lock
        self._took: deque[float] = deque(maxlen=32)  # seconds in a slot of those that ended last
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if not self.compiled:
            self._warming.start()

    def stop(self) -> None:
        """Ends the thread after its present step; what is unfinished gets Stopped."""
        self._stopping = True
        self._inbox.put(None)
        for thread in (self._thread, self._warming):
            if thread.is_alive():
                thread.join()

    @property
    def alive(self) -> bool:
        """Not failed and not stopping; it may not have been started yet."""
        return self.failure is None and not self._stopping

    @property
    def ready(self) -> bool:
        return self.alive and self._thread.is_alive()

    def counts(self) -> dict[str, int]:
        """{"active": requests in slots, "queued": requests that wait for one}."""
        active = self.engine.active
        return {"active": active, "queued": max(0, len(self._unended) - active)}

    def submit(self, requests: Sequence[Request], deliver: Callable[[int, Update], None]) -> list[Job]:
        """All of them or none: Busy where too many wait, ApiError where they are too many by themselves, Stopped where
        the engine is down.

        deliver(i, update) says what is new of requests[i].
        """
        jobs = [Job(request, functools.partial(deliver, i)) for i, request in enumerate(requests)]
        with self._lock:
            if not self.alive:
                raise self._stopped()
            room = self.engine.slots + self._max_waiting
            if len(jobs) > room:
                raise ApiError(400, f"these are {len(jobs)} answers at once, and {room} are the most at this server")
            if len(self._unended) + len(jobs) > room:
                raise Busy(self._retry_after(len(jobs)))
            self._unended.update(jobs)
            for job in jobs:
                self._inbox.put(job)
        return jobs

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest. Nothing where the job has ended."""
        self._inbox.put(job)  # for the second time

    def _retry_after(self, wanted: int) -> int:
        """Whole seconds until `wanted` of those that run should have ended, from how long the last ones took."""
        took = sum(self._took) / len(self._took) if self._took else 1.0
        return min(60, max(1, math.ceil(took * wanted / self.engine.slots)))

    def _warm_up(self, likely: Sequence[Request]) -> None:
        """A program at a time, while no request is worked on, and behind all else: on a CPU both want the cores."""
        if sys.platform == "linux":  # where threads have priorities of their own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        programs = itertools.chain.from_iterable(map(self.engine.warm_up, likely))
        while self.alive and not self.compiled:
            if self.engine.busy:
                time.sleep(0.01)
            else:
                self.compiled = next(programs, self) is self

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._read_inbox()
                if self.engine.busy:
                    for event in self.engine.step():
                        job = self._jobs[event.ticket] if event.completion is None else self._jobs.pop(event.ticket)
                        self._deliver(job, event)
        except Exception as e:
            self.failure = e
        with self._lock:
            self._stopping = True
        for job in list(self._unended):
            self._deliver(job, self._stopped())

    def _stopped(self) -> Stopped:
        return Stopped(self.failure or "the server is stopping")

    def _read_inbox(self) -> None:
        """Takes everything that has come; waits for something where there is nothing to do."""
        while not self._stopping:
            try:
                job = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return
            if job is None or job.ended:
                continue
            if job.ticket is not None:
                self.engine.cancel(job.ticket)
            else:
                try:
                    job.ticket = self.engine.submit(job.request)
                    self._jobs[job.ticket] = job
                except ValueError as e:  # this request's fault, and no other's
                    self._deliver(job, UserError(str(e)))

    def _deliver(self, job: Job, update: Update) -> None:
        now = time.perf_counter()
        if isinstance(update, Event) and update.ids and job.began is None:
            job.began = now
        if isinstance(update, Exception) or update.completion is not None:
            with self._lock:
                self._unended.discard(job)
                if job.began is not None:
                    self._took.append(now - job.began)
            job.ended = True
        job.deliver(update)

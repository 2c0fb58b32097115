"""One thread owns the engine. Requests come to it through an inbox, and what it makes goes back by callbacks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from nanochat_jax.engine import Completion, Engine, Request, Ticket


class Busy(Exception):
    """More requests wait than may."""


class Stopped(Exception):
    """The engine thread has ended, of itself or by a failure, which the message names."""


@dataclass(frozen=True)
class Update:
    """New ids of a request; the completion when it has ended; an error when it never will."""

    ids: list[int]
    completion: Completion | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    request: Request
    deliver: Callable[[Update], None]  # called in the engine thread
    ticket: Ticket | None = None
    cancelled: bool = False
    ended: bool = False


class Scheduler:
    """Runs requests until `stop`. `submit` and `cancel` may be called from any thread."""

    def __init__(self, engine: Engine, max_waiting: int = 64):
        self.engine, self.failure = engine, None
        self._max_waiting, self._inbox = max_waiting, queue.Queue()
        self._jobs: dict[Ticket, Job] = {}  # only the engine thread touches it
        self._lock, self._unended, self._stopping = threading.Lock(), 0, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step; what is unfinished gets Stopped."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self.failure is None and not self._stopping

    def counts(self) -> dict[str, int]:
        """{"active": requests in slots, "queued": requests that wait for one}."""
        active = self.engine.active
        return {"active": active, "queued": max(0, self._unended - active)}

    def submit(self, request: Request, deliver: Callable[[Update], None]) -> Job:
        """Busy where too many wait, Stopped where the engine is down."""
        with self._lock:
            if not self.alive:
                raise Stopped(str(self.failure or "the server is stopping"))
            if self._unended >= self.engine.slots + self._max_waiting:
                raise Busy
            self._unended += 1
            job = Job(request, deliver)
            self._inbox.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """The client has gone. Nothing where the job has ended."""
        job.cancelled = True
        self._inbox.put(job)

    # ---------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._read_inbox()
                for event in self.engine.step() if self.engine.busy else ():
                    job = self._jobs[event.ticket]
                    if event.completion is not None:
                        del self._jobs[event.ticket]
                    self._deliver(job, Update(event.ids, event.completion))
        except Exception as e:
            self.failure = e
        with self._lock:
            self._stopping = True
        error = Stopped(str(self.failure or "the server is stopping"))
        for job in [*self._jobs.values(), *self._drained()]:
            if not job.ended:
                self._deliver(job, Update([], error=error))

    def _read_inbox(self) -> None:
        """Takes everything that has come; waits for something where there is nothing to do."""
        while not self._stopping:
            try:
                job = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return
            if job is None or job.ended:
                continue
            if job.ticket is None and not job.cancelled:
                job.ticket = self.engine.submit(job.request)
                self._jobs[job.ticket] = job
            elif job.ticket is None:
                self._deliver(job, Update([], Completion(finish_reason="cancelled")))
            else:
                self.engine.cancel(job.ticket)

    def _drained(self) -> list[Job]:
        out = []
        while not self._inbox.empty():
            out.append(self._inbox.get())
        return [job for job in dict.fromkeys(out) if job is not None and job.ticket is None]

    def _deliver(self, job: Job, update: Update) -> None:
        if update.completion is not None or update.error is not None:
            with self._lock:
                self._unended -= not job.ended
            job.ended = True
        job.deliver(update)

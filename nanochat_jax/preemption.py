"""Signals that ask a run to stop: the loop polls a flag, saves and leaves."""

from __future__ import annotations

import signal
import threading


class Stop:
    """As a context manager it turns the first SIGTERM or Ctrl-C into `requested`; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self):
        self.requested = False
        self._before: dict = {}

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

"""Signals that ask a run to stop: the loop polls a flag, saves and leaves.

A cluster sends SIGTERM, or what it was told to send some minutes before it takes the machine (SLURM:
`#SBATCH --signal=USR1@120`), to one host or to all, at one moment, but at different steps of each. All must save the
same step, so the processes agree on it.
"""

import signal
import threading
from typing import Self

from nanochat_jax.mesh import hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """As a context manager it turns the first of SIGNALS into `requested`; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # SIGTERM, SIGINT, SIGUSR1, or what `ask` was given
        self._before: dict = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def ask(self, why: str) -> None:
        self.signal = self.signal or why

    @property
    def why(self) -> str:
        """For the message: the signal, or that it came elsewhere."""
        return self.signal or "a signal to another host"

    def agreed(self, due: bool = False) -> tuple[bool, bool]:
        """(stop, save): whether any process was asked to stop, and whether any of them gave `due`.

        Call it once a step, at the same point in every process: all get the same answer at the same step. The devices
        work on meanwhile.
        """
        stop, save = zip(*hosts.gather("the end of a step", [self.requested, due]))
        return any(stop), any(save)

    def _handle(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not set, such as the one of jax.distributed for SIGTERM
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

"""Signals that ask a run to stop: the loop polls a flag, saves and leaves.

A cluster sends SIGTERM, or what it was told to send some minutes before it takes the machine (SLURM:
`#SBATCH --signal=USR1@120`), to one host or to all, at one moment, but at different steps of each. All must save the
same step, so the processes agree on it.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """As a context manager it turns the first of SIGNALS into `requested`; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # SIGTERM, SIGINT, SIGUSR1, or what `ask` was given
        self._before: dict = {}
        self._pending: jax.Array | None = None  # on several hosts: the flags of the step before

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def ask(self, why: str) -> None:
        """Asks this process to stop, as a signal would."""
        self.signal = self.signal or why

    @property
    def why(self) -> str:
        """For the message: the signal, or that it came elsewhere."""
        return self.signal or "a signal to another host"

    def agreed(self, due: bool = False) -> tuple[bool, bool]:
        """(stop, save): whether any process was asked to stop, and whether any of them gave `due`.

        Call it once a step, at the same point in every process: all get the same answer at the same step. With one
        process that is its own flags. With several, each step starts a small all-reduce behind the step's own work and
        reads the one of the step before, so that nothing waits: what is asked for in a step is known in the next.
        """
        if jax.process_count() == 1:
            return self.requested, due
        stop, save = np.asarray(self._pending.addressable_data(0)) if self._pending is not None else (False, False)
        split, any_row = _any_row()
        mine = np.asarray([[self.requested, due and not save]])  # what is due is said once
        self._pending = any_row(jax.make_array_from_process_local_data(split, mine, (jax.process_count(), 2)))
        return bool(stop), bool(save)

    def _handle(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not set, such as the one of jax.distributed for SIGTERM
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


@functools.cache
def _any_row() -> tuple[NamedSharding, Callable]:
    """(a sharding of (processes, 2) flags, a row on one device of each process; the jitted `or` of the rows)"""
    one_each = {d.process_index: d for d in reversed(jax.devices())}
    mesh = Mesh([one_each[i] for i in sorted(one_each)], ("host",))
    return NamedSharding(mesh, P("host")), jax.jit(lambda x: x.any(0), out_shardings=NamedSharding(mesh, P()))

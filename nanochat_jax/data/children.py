"""Child processes that a generator runs in: its values come to the parent in order, a few of them made ahead.

A child is a fresh Python that imports what the generator needs and no more: neither the parent's main module, as
multiprocessing's would, nor jax. It is nice, ignores Ctrl-C, and ends when its parent does, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from nanochat_jax.errors import UserError
from nanochat_jax.processes import cores

PREFETCH = 32  # values made before they are asked for
NICE = 10  # training has priority
MOST = 64  # children worth having: then the process that takes what they make is busy


class Killed(Exception):
    """The child ended without a word."""


def spare_cores() -> int:
    """Cores that this process may use, less one for itself; from 1 to MOST."""
    return min(max(cores() - 1, 1), MOST)


class Child(contextlib.AbstractContextManager):
    """`function(received, *args)`, a generator, in a process of its own. `received` iterates over what `send` sends.

    What goes either way is pickled. Iterating gives what it yields; UserError is raised as itself, another exception
    as RuntimeError with the traceback, and Killed where the process ended in the middle.
    """

    def __init__(self, function: Callable[..., Iterator], *args):
        self._link, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            )
        self.pid = self._process.pid
        self.send((function, args))

    def send(self, value) -> None:
        """Never waits for long: the child takes in whatever comes."""
        with contextlib.suppress(BrokenPipeError):  # then reading says that it ended
            self._link.send(value)

    def __iter__(self) -> Child:
        return self

    def __next__(self):
        try:
            kind, value = self._link.recv()
        except (EOFError, OSError):  # nothing, or half a message
            status = self._process.wait()
            ending = f"status {status}" if status >= 0 else signal.Signals(-status).name
            raise Killed(f"a process was killed ({ending})") from None
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __exit__(self, *exc) -> None:
        self.close()


def serve(fd: int) -> None:
    """What a child runs."""
    link = Connection(fd)
    os.dup2(2, 1)  # what is printed goes to stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outbox: queue.Queue[tuple[str, Any] | None] = queue.Queue(PREFETCH)

    def read() -> None:
        with contextlib.suppress(Exception):
            while True:
                inbox.put(link.recv())
        os._exit(1)  # the parent is gone

    def write() -> None:
        with contextlib.suppress(OSError):
            while (message := outbox.get()) is not None:
                link.send(message)
            return
        os._exit(1)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        function, args = link.recv()
        threading.Thread(target=read, daemon=True).start()
        for value in function(iter(inbox.get, None), *args):
            outbox.put(("value", value))
        outbox.put(("error", StopIteration()))
    except (UserError, Killed) as e:  # the latter of a child of its own
        outbox.put(("error", e))
    except BaseException:
        outbox.put(("error", RuntimeError(traceback.format_exc())))
    outbox.put(None)
    writer.join()
    os._exit(0)  # without waiting for what else runs

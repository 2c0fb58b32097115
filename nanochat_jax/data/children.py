"""Child processes that a generator runs in: its values come to the parent in order, a few of them made ahead.

A child is a fresh Python that imports what the generator needs and no more: neither the parent's main module nor jax.
It is nice, ignores Ctrl-C, and ends when its parent does, however that ends: its standard input then closes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from nanochat_jax.errors import UserError

AHEAD = 32  # values made before they are asked for
NICE = 10  # what trains goes first
MOST = 64  # children worth having: then the one who takes what they make is busy


class Killed(Exception):
    """The child ended without a word."""


def spare_cores() -> int:
    """Cores that this process may use, less one for itself; from 1 to MOST."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores - 1, 1), MOST)


class Child:
    """`function(received, *args)`, a generator, in a process of its own. `received` iterates over what `send` sends.

    What goes either way is pickled. Iterating gives what it yields; UserError is raised as itself, another exception of
    its as RuntimeError with the traceback, and Killed where the process ended in the middle.
    """

    def __init__(self, function: Callable[..., Iterator], *args):
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.pid = self._process.pid
        self.send((function, args))

    def send(self, value) -> None:
        """Never waits for long: the child takes in whatever comes."""
        with contextlib.suppress(BrokenPipeError):  # then reading says that it ended
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def __iter__(self) -> Child:
        return self

    def __next__(self):
        try:
            kind, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError):  # nothing, half a message, a closed file
            raise Killed(f"a process was killed ({_ending(self._process.wait())})") from None
        if kind == "value":
            return value
        if kind == "user error":
            raise UserError(value)
        if kind == "killed":
            raise Killed(value)
        if kind == "error":
            raise RuntimeError(value)
        raise StopIteration

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _ending(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


# ---------------------------------------------------------------------------------------------- in the child


def serve() -> None:
    """What a child runs."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not come between
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    inbox, outbox = queue.SimpleQueue(), queue.Queue(AHEAD)

    def read() -> None:
        with contextlib.suppress(Exception):
            while True:
                inbox.put(pickle.load(source))
        os._exit(1)  # the parent is gone

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            while (message := outbox.get()) is not None:
                pickle.dump(message, sink, pickle.HIGHEST_PROTOCOL)
                sink.flush()
            return
        os._exit(1)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        function, args = pickle.load(source)
        threading.Thread(target=read, daemon=True).start()
        for value in function(iter(inbox.get, None), *args):
            outbox.put(("value", value))
        outbox.put(("end", None))
    except UserError as e:
        outbox.put(("user error", str(e)))
    except Killed as e:  # a child of its own
        outbox.put(("killed", str(e)))
    except BaseException:
        outbox.put(("error", traceback.format_exc()))
    outbox.put(None)
    writer.join()
    os._exit(0)  # without waiting for what else runs

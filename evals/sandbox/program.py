"""The process that becomes the program: it takes its limits, runs the source, and reports how that ended."""

from __future__ import annotations

import atexit
import contextlib
import json
import linecache
import os
import resource
import signal
import socket
import sys
import threading
import traceback
import types
from typing import NoReturn

from evals.sandbox import guard, linux, seccomp
from evals.sandbox.result import Outcome, could_be_refusal, of_exception
from evals.sandbox.walls import Walls

FILE_BYTES = 16 * 1024 * 1024  # of any file that the program writes
OPEN_FILES = 64
PROCESSES = 64  # and threads
NAME = "program.py"


def become(request: dict, scratch: str, nonce: bytes, report: int, door: socket.socket, has: Walls) -> NoReturn:
    """Runs request["source"] in this process, whose descriptors 0, 1 and 2 are in place.

    report: where `nonce` and a JSON object go at the end. door: takes a byte when all limits are in force, and with it
    the listener of the system call filter; the program never has it.
    """
    # As they are before the program changes them.
    leave, tell, dump, number, me = os._exit, os.write, json.dumps, os.getpid, os.getpid()
    _confine(request, scratch, door, has)
    report = os.dup2(report, 3)
    os.closerange(4, 1 << 16)
    seen = [] if has.namespaces else guard.put_up(scratch)
    outcome, detail, could_be = _run(request["source"], scratch)
    if number() == me:  # and not something that it forked
        told = {"outcome": outcome, "detail": detail, "could_be": could_be, "refused": seen}
        with contextlib.suppress(OSError):
            tell(report, nonce + dump(told).encode())
    leave(0)


def _confine(request: dict, scratch: str, door: socket.socket, has: Walls) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(scratch)
    if os.environ["HOME"] != scratch:
        os.environ.update({"HOME": scratch, "TMPDIR": scratch})
    _forget_ourselves(keep_ctypes=has.namespaces)
    if has.namespaces:
        linux.drop_capabilities()
    _set_limits(request, PROCESSES + 3 if has.namespaces else _running_tasks() + PROCESSES)
    linux.gain_nothing_from_now_on()
    listener = [seccomp.install(alone=None if has.namespaces else os.getpid())] if has.seccomp else []
    socket.send_fds(door, [b"1"], listener)
    door.close()


def _running_tasks() -> int:
    """All that run on the machine: a limit on processes counts what the user runs already."""
    try:
        with open("/proc/loadavg") as f:
            return int(f.read().split()[3].split("/")[1])
    except OSError:
        return 4096


def _set_limits(request: dict, processes: int) -> None:
    limits = {
        "RLIMIT_AS": request["memory_mb"] * 1024 * 1024,
        "RLIMIT_CPU": int(request["timeout"]) + 2,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": processes,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    for name, value in limits.items():
        try:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):
            if sys.platform == "linux":
                raise  # elsewhere not every limit exists, or can be set


def _forget_ourselves(keep_ctypes: bool) -> None:
    """The program finds a fresh interpreter, but for modules of the standard library that are loaded already."""
    for name in list(sys.modules):
        ours = name.split(".")[0] in ("evals", "nanochat_jax")
        if ours or (not keep_ctypes and name.split(".")[0] in ("ctypes", "_ctypes")):
            del sys.modules[name]


def _run(source: str, scratch: str) -> tuple[Outcome, str, bool]:
    """(outcome, detail, whether a refused system call could be the reason)."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    ended = Outcome.PASSED, "", False
    try:
        code = compile(source, NAME, "exec", dont_inherit=True)
        linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
        exec(code, main.__dict__)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        ended = Outcome.LEFT_EARLY, f"SystemExit: {e.code}"[:500], False
    except BaseException as e:
        with contextlib.suppress(Exception):
            # Without our own frame at the top.
            traceback.print_exception(type(e), e, e.__traceback__ and e.__traceback__.tb_next)
        ended = *of_exception(e, scratch), could_be_refusal(e)
    # What an interpreter does at its end.
    with contextlib.suppress(BaseException):
        threading._shutdown()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return ended

"""The process that becomes the program: it takes its limits, runs the source, and reports how that ended."""

import atexit
import contextlib
import errno
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
from pathlib import Path
from typing import NoReturn

from evals.sandbox import linux, seccomp
from evals.sandbox.isolation import Layers
from evals.sandbox.result import Outcome, could_be_refusal, is_outside, of_exception
from nanochat_jax.processes import prctl

FILE_BYTES = 16 * 1024 * 1024  # of any file that the program writes
OPEN_FILES = 64
PROCESSES = 64  # and threads
NAME = "program.py"
CONFINED = b"C"  # what is sent when all limits are in force, with the listener of the system call filter
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED_EVENTS = (
    *("os.fork", "os.posix_spawn", "os.exec", "os.system", "os.kill", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.send", "socket.get", "signal.pthread_kill", "resource."),
)
_TWO_PATHS = ("os.rename", "os.link", "os.symlink", "shutil.move")
_ONE_PATH = ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")


def become(request: dict, scratch: str, nonce: bytes, report: int, events: socket.socket, layers: Layers) -> NoReturn:
    """Runs request["source"] in this process, whose descriptors 0, 1 and 2 are in place.

    report: where `nonce` and a JSON object go at the end. events: where CONFINED goes; the program never has it.
    """
    # As they are before the program changes them.
    leave, tell, dump, number, me = os._exit, os.write, json.dumps, os.getpid, os.getpid()
    _confine(request, scratch, events, layers)
    report = os.dup2(report, 3)
    os.closerange(4, 1 << 16)
    seen = [] if layers.namespaces else _install_audit_hook(scratch)
    outcome, detail, could_be = _run(request["source"], scratch)
    if number() == me:  # and not something that it forked
        told = {"outcome": outcome, "detail": detail, "could_be": could_be, "refused": seen}
        with contextlib.suppress(OSError):
            tell(report, nonce + dump(told).encode())
    leave(0)


def _confine(request: dict, scratch: str, events: socket.socket, layers: Layers) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(scratch)
    os.environ.update({"HOME": scratch, "TMPDIR": scratch})
    # It finds a fresh interpreter, but for modules of the standard library that are loaded already.
    forgotten = ("evals", "nanochat_jax") if layers.namespaces else ("evals", "nanochat_jax", "ctypes", "_ctypes")
    for name in [name for name in sys.modules if name.split(".")[0] in forgotten]:
        del sys.modules[name]
    if layers.namespaces:
        linux.drop_capabilities()
    _set_limits(request, PROCESSES + 3 if layers.namespaces else _running_tasks() + PROCESSES)
    prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    listener = [seccomp.install(alone=None if layers.namespaces else os.getpid())] if layers.seccomp else []
    socket.send_fds(events, [CONFINED], listener)
    events.close()


def _running_tasks() -> int:
    """All that run on the machine: a limit on processes counts what the user runs already."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
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


def _install_audit_hook(scratch: str) -> list[str]:
    """Without namespaces: refuses, for good, what a program would do by accident: new processes, signals to others,
    sockets, ctypes, and writing or deleting outside of the scratch folder. Returns a list that refused events join.

    No security boundary: a C extension gets past such a hook, and what the user may read can be read.
    """
    seen: list[str] = []

    def refuse(event: str, args: tuple) -> None:
        if event.startswith("ctypes."):
            raise ImportError("ctypes is refused here")  # which libraries know how to do without
        if event.startswith(_REFUSED_EVENTS):
            if event not in seen and len(seen) < 16:
                seen.append(event)
            raise PermissionError(errno.EPERM, f"{event} is refused here")
        writes = event in _ONE_PATH or event in _TWO_PATHS or (event == "open" and (args[2] or 0) & _WRITING)
        for path in args[: 2 if event in _TWO_PATHS else 1] if writes else ():
            if is_outside(path, scratch) and os.path.realpath(os.fsdecode(path)) != os.devnull:
                raise PermissionError(errno.EPERM, f"{event} is refused here", path)

    sys.addaudithook(refuse)
    return seen


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
        with contextlib.suppress(Exception):  # without our own frame at the top
            traceback.print_exception(type(e), e, e.__traceback__ and e.__traceback__.tb_next)
        ended = *of_exception(e, scratch), could_be_refusal(e)
    # What an interpreter does at its end.
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads; nothing public does
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return ended

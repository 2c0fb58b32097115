"""Runs a program that a model wrote, in a process of its own, and says whether it ran to its end.

`run_program(source)` starts a fresh isolated interpreter (never a fork of the caller, which holds JAX's threads), works
off the main thread and needs no signals. What it guards against is accident: a model's code that loops, eats memory,
prints without end, deletes files, forks, or asks the network.

- time: the whole process group is killed at the timeout, and at the end in any case
- memory, CPU seconds, file size, open files and (where not root, whom Linux exempts) processes have hard rlimits
- an audit hook refuses new processes, signals to others, sockets, ctypes, and writing or deleting outside of the
  scratch folder, which is empty at the start and removed at the end
- stdin is empty, the environment bare, output kept up to a limit and drained beyond it

What it does not protect from: code that means harm. Audit hooks are no security boundary (any C extension gets past
them), files that the user may read can be read, many files can fill a disk, and a process that leaves its session
outlives the kill. There is no seccomp, container or virtual machine here: run untrusted models inside of one.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

OUTPUT_BYTES = 64 * 1024  # of each stream; more is read and thrown away
FILE_BYTES = 16 * 1024 * 1024  # of any file that the program writes

# The child's own first lines: it takes its limits, then becomes the program. A byte on `done` says that it ran through.
_LAUNCHER = r"""
def _launch():
    import os, resource, sys
    done, path, memory, seconds, file_bytes = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
    limits = {"RLIMIT_AS": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": file_bytes, "RLIMIT_NOFILE": 64}
    limits |= {"RLIMIT_CORE": 0, "RLIMIT_NPROC": 4096}
    try:
        with open("/proc/loadavg") as f:  # this limit counts what the user runs already: so many, and a few more
            limits["RLIMIT_NPROC"] = int(f.read().split()[3].split("/")[1]) + 64
    except OSError:
        pass  # no /proc: the constant above
    for name, value in limits.items():
        try:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):
            if sys.platform == "linux":
                raise  # elsewhere not every limit exists, or can be set
    with open(path, encoding="utf-8", errors="surrogatepass") as f:
        code = compile(f.read(), "program.py", "exec", dont_inherit=True)
    scratch = os.path.realpath(os.getcwd())
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    refused = (
        "os.fork", "os.posix_spawn", "os.exec", "os.system", "os.kill", "subprocess.Popen", "pty.spawn", "ctypes.",
        "socket.connect", "socket.bind", "socket.send", "socket.get", "signal.pthread_kill", "resource.",
    )
    two_paths = ("os.rename", "os.link", "os.symlink", "shutil.move")
    one_path = ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")

    def inside(path):
        if isinstance(path, int):
            return True  # a descriptor was judged when it was opened
        path = os.path.realpath(os.fsdecode(path))
        return path == scratch or path.startswith(scratch + os.sep) or path == os.devnull

    def guard(event, args):
        if event == "open":
            if not (args[2] or 0) & writing or inside(args[0]):
                return
        elif event.startswith(refused):
            if event.startswith("ctypes."):
                raise ImportError("ctypes is refused here")  # which libraries know how to do without
        elif event in two_paths or event in one_path:
            if all(inside(p) for p in args[: 2 if event in two_paths else 1]):
                return
        else:
            return
        raise PermissionError(f"{event} is refused here" + (f": {args[0]!r}" if args else ""))

    sys.argv[:] = ["program.py"]
    main = sys.modules["__main__"].__dict__
    del main["_launch"]
    sys.addaudithook(guard)
    exec(code, main)
    os.write(done, b"1")

_launch()
"""


@dataclass(frozen=True)
class Result:
    """ok: the program ran past its last line and exited with 0. Output is text, cut at OUTPUT_BYTES a stream."""

    ok: bool
    stdout: str
    stderr: str
    timed_out: bool


def run_program(source: str, timeout: float = 5.0, memory_mb: int = 512) -> Result:
    """Runs Python `source` for at most `timeout` seconds in `memory_mb` MiB of address space.

    A program that leaves early, even with sys.exit(0), is not ok: the tests at its end have not run then.
    """
    root = Path(tempfile.mkdtemp(prefix="sandbox-"))
    try:
        scratch, program = root / "scratch", root / "program.py"
        scratch.mkdir()
        program.write_text(source, encoding="utf-8", errors="surrogatepass")
        return _run(program, scratch, timeout, memory_mb)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run(program: Path, scratch: Path, timeout: float, memory_mb: int) -> Result:
    done_read, done_write = os.pipe()
    limits = [memory_mb * 1024 * 1024, int(timeout) + 2, FILE_BYTES]
    command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", _LAUNCHER, str(done_write), str(program)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(scratch), "TMPDIR": str(scratch), "LANG": "C.UTF-8"}
    # Every thread's arena, and every pool of threads, would reserve address space.
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with os.fdopen(done_read, "rb", buffering=0) as done:
        try:
            process = subprocess.Popen(
                [*command, *map(str, limits)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=env,
                pass_fds=(done_write,),
                start_new_session=True,
            )
        finally:
            os.close(done_write)
        with process:
            try:
                out, err, timed_out = _collect(process, time.monotonic() + timeout)
            finally:
                # All processes of its session, whatever it left behind. It is not reaped yet, so the number is its own.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        os.set_blocking(done.fileno(), False)
        finished = done.read(1) == b"1"
    ok = finished and process.returncode == 0 and not timed_out
    return Result(ok, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), timed_out)


def _collect(process: subprocess.Popen, deadline: float) -> tuple[bytes, bytes, bool]:
    """(stdout, stderr, timed out) up to the process's end or the deadline; reads on past OUTPUT_BYTES, keeping none."""
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            events = selector.select(min(left, 0.02))
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                held = kept[key.fileobj]
                held += data[: OUTPUT_BYTES - len(held)]
            # Its end is what counts: something that it started may hold the pipes open.
            if not events and _has_ended(process.pid):
                return bytes(kept[process.stdout]), bytes(kept[process.stderr]), False
    return bytes(kept[process.stdout]), bytes(kept[process.stderr]), not _has_ended(process.pid)


def _has_ended(pid: int) -> bool:
    """Whether a child is dead; leaves it unreaped, so that its number is not given to another process."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

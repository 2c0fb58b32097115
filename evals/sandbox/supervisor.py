"""Starts one program, holds its limits, and says how it ended.

    worker ── init (process 1 of the program's own namespace) ── program

The worker stands outside of the program's process namespace. When init ends, the kernel ends all that is in there.
"""

import contextlib
import functools
import glob
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from typing import NoReturn

from evals.sandbox import isolation, linux, program, seccomp
from evals.sandbox.isolation import Layers
from evals.sandbox.result import Outcome, Result, with_refusals
from nanochat_jax.processes import die_with_parent

OUTPUT_BYTES = 64 * 1024  # of each stream; what comes after is read and thrown away
FLOOD_BYTES = 16 * 1024 * 1024  # of all together; then the program is killed
_TICK = 0.02  # seconds between looks at the memory
_ENDED = b"E"  # what init sends when the program has ended, and with it _STATUS
_STATUS = struct.Struct("=i?")  # the program's wait status, and whether processes outlived it


def run(request: dict, control: socket.socket, layers: Layers, proc: int | None, temp: str) -> Result:
    """Runs one program to its end. EOFError where the evaluator hung up at `control` meanwhile, RuntimeError where the
    program could not be started. proc: a descriptor of the machine's /proc. temp: scratch folders' without namespaces.
    """
    if layers.namespaces:
        return _Supervisor(request, isolation.SCRATCH, layers, proc, control).run()
    scratch = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-", dir=temp))
    try:
        return _Supervisor(request, scratch, layers, proc, control).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Supervisor:
    def __init__(self, request: dict, scratch: str, layers: Layers, proc: int | None, control: socket.socket):
        self.request, self.scratch, self.layers, self.proc, self.control = request, scratch, layers, proc, control
        self.kept = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
        self.read_bytes = 0
        self.refused: list[str] = []
        self.nonce = os.urandom(16)
        self.confined = False  # whether all limits held the program before it ran
        self.ended: tuple[int, bool] | None = None  # as _STATUS
        self.poller = select.poll()
        self.sources: dict[int, str] = {}  # descriptor -> what it is

    def run(self) -> Result:
        pipes = {name: os.pipe() for name in self.kept}
        self.events, theirs = socket.socketpair()
        self.init = linux.fork_init() if self.layers.namespaces else os.fork()
        if self.init == 0:
            _be_init(self, {name: write for name, (_, write) in pipes.items()}, theirs)
        theirs.close()
        self._listen(self.events.fileno(), "events")
        self._listen(self.control.fileno(), "control")
        for name, (read, write) in pipes.items():
            os.close(write)
            os.set_blocking(read, False)
            self._listen(read, name)
        try:
            outcome = self._watch(time.monotonic() + self.request["timeout"])
        finally:
            self._kill_all()
        while self._take_event():  # all writers have ended: what is left in the socket and the pipes is all there is
            pass
        self.events.close()
        for fd, name in self.sources.items():
            while name in self.kept and self._read(fd, name):
                pass
            if name not in ("events", "control"):
                os.close(fd)
        return self._result(outcome)

    def _listen(self, fd: int, name: str) -> None:
        self.sources[fd] = name
        self.poller.register(fd, select.POLLIN)

    def _watch(self, deadline: float) -> Outcome | None:
        """Until the program has ended (None), or must be killed: the outcome."""
        looked = time.monotonic()
        while self.ended is None:
            now = time.monotonic()
            if now >= deadline:
                return Outcome.TIMED_OUT
            if now - looked >= _TICK:
                looked = now
                if self._memory_bytes() > self.request["memory_mb"] << 20:
                    return Outcome.OUT_OF_MEMORY
            for fd, event in self.poller.poll(1000 * min(_TICK, deadline - now)):
                name = self.sources[fd]
                if name == "control":
                    raise EOFError("the evaluator hung up")
                if name == "events":
                    if not self._take_event():
                        raise RuntimeError("the sandbox could not start init, or it was killed")
                elif name == "listener" and event & select.POLLIN:
                    call = seccomp.refuse_next(fd)
                    if call and call not in self.refused and len(self.refused) < 16:
                        self.refused.append(call)
                elif name == "listener" or not self._read(fd, name):
                    self.poller.unregister(fd)  # nobody is at the other end any more
            if self.ended is None and self.read_bytes > FLOOD_BYTES:
                return Outcome.TOO_MUCH_OUTPUT
        return None

    def _take_event(self) -> bool:
        """Takes what init and the program send; False where both have ended."""
        kind, descriptors, _, _ = socket.recv_fds(self.events, 1, 1)
        if kind == program.CONFINED:
            self.confined = True
            for listener in descriptors:
                self._listen(listener, "listener")
        elif kind == _ENDED:
            self.ended = _STATUS.unpack(self.events.recv(_STATUS.size))
        return bool(kind)

    def _read(self, fd: int, name: str) -> bool:
        """Takes what a pipe holds; False at its end, or where there is nothing."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        held = self.kept[name]
        held += data[: OUTPUT_BYTES - len(held)]
        self.read_bytes += len(data)
        return bool(data)

    def _memory_bytes(self) -> int:
        """What all processes of the program hold together, pages that they share counted once."""
        pids = _descendants(self.proc, self.init)
        pages = [_read_proc(self.proc, f"{pid}/statm").split() for pid in pids]
        total = sum(int(p[1]) for p in pages if p) * os.sysconf("SC_PAGE_SIZE")
        if total <= self.request["memory_mb"] << 20:
            return total  # the exact sum, which takes the kernel longer, is no more than this
        exact = [_read_proc(self.proc, f"{pid}/smaps_rollup").partition(b"\nPss:")[2].split() for pid in pids]
        return sum(int(p[0]) << 10 for p in exact if p)

    def _kill_all(self) -> None:
        """With namespaces it is enough to kill init: the kernel kills the rest before init can be reaped."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.init, signal.SIGKILL)
        os.waitpid(self.init, 0)
        if self.layers.namespaces:
            return
        with contextlib.suppress(ChildProcessError):  # until there are no children: this process adopts orphans
            while True:
                for pid in _descendants(self.proc, os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    time.sleep(0.001)

    def _result(self, outcome: Outcome | None) -> Result:
        stdout, stderr = (self.kept[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
        (status, left_behind), detail = self.ended or (0, False), ""
        if outcome is None and not self.confined:
            raise RuntimeError(f"the sandbox could not start a program: {stderr}")
        if outcome is None:
            outcome, detail = self._from_report(os.waitstatus_to_exitcode(status))
        return Result(outcome, detail, stdout, stderr, tuple(self.refused), left_behind)

    def _from_report(self, code: int) -> tuple[Outcome, str]:
        """Of a program that ended by itself: by its exit code (negative: a signal), and what was reported before."""
        if code == -signal.SIGXCPU:
            return Outcome.TIMED_OUT, "of CPU"
        if code < 0:  # not all real-time signals have names
            return Outcome.KILLED, {int(s): s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        report = bytes(self.kept["report"])
        if not report:
            return Outcome.LEFT_EARLY, f"exit status {code}"
        if not report.startswith(self.nonce):
            return Outcome.FORGED, ""
        try:
            told = json.loads(report.removeprefix(self.nonce))
            outcome, detail, could_be = Outcome(told["outcome"]), str(told["detail"]), bool(told["could_be"])
            self.refused = [*map(str, told["refused"]), *self.refused][:16]
        except (ValueError, KeyError, TypeError, RecursionError):
            return Outcome.FORGED, ""
        if outcome is Outcome.PASSED and code != 0:
            return Outcome.LEFT_EARLY, f"exit status {code}"
        return with_refusals(outcome, self.refused, could_be), detail


def _descendants(proc: int | None, pid: int) -> list[int]:
    """Process ids below one, as the machine numbers them; [] where /proc does not say."""
    found = [pid]
    for parent in found:  # which grows
        for name in glob.iglob(f"{parent}/task/*/children", dir_fd=proc):
            found += map(int, _read_proc(proc, name).split())
    return found[1:]


def _read_proc(proc: int | None, path: str) -> bytes:
    """A file below /proc; nothing where its process has gone."""
    try:
        with open(path, "rb", opener=functools.partial(os.open, dir_fd=proc)) as f:
            return f.read()
    except OSError:
        return b""


def _be_init(run: _Supervisor, outputs: dict[str, int], events: socket.socket) -> NoReturn:
    """Starts the program and waits for its end. In a namespace this is process 1: orphans become its children."""
    try:
        # The namespace cannot send to process 1 the signals for which it has no handler.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        run.events.close()
        os.setsid()
        die_with_parent()
        if run.layers.namespaces:
            isolation.mount_scratch()
        if select.select([events], [], [], 0)[0]:
            os._exit(1)  # the worker ended before it could take this process with it
        me, child = os.getpid(), os.fork()
        if child == 0:
            if not run.layers.namespaces:  # with them, the end of process 1 is the end of all
                die_with_parent()
                if os.getppid() != me:
                    os._exit(1)
            os.dup2(outputs["stdout"], 1)
            os.dup2(outputs["stderr"], 2)
            program.become(run.request, run.scratch, run.nonce, outputs["report"], events, run.layers)
        while (ended := os.wait())[0] != child:
            pass
        events.sendall(_ENDED + _STATUS.pack(ended[1], _has_children()))
    except BaseException:  # such as a limit that leaves no room for an interpreter; the program's go to its stderr
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _has_children() -> bool:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False

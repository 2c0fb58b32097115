"""Watches over one program: starts it, holds its limits, and says how it ended.

    worker ── init (process 1 of the program's own namespace) ── program

The worker stands outside of the program's process namespace. When init ends, the kernel ends all that is in there.
"""

from __future__ import annotations

import contextlib
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

from evals.sandbox import program, seccomp, walls
from evals.sandbox.result import Outcome, with_refusals
from evals.sandbox.walls import Walls
from nanochat_jax.processes import die_with_parent

OUTPUT_BYTES = 64 * 1024  # of each stream; what comes after is read and thrown away
FLOOD_BYTES = 16 * 1024 * 1024  # of both together; then the program is killed
_TICK = 0.02  # seconds between looks at the memory
_STATUS = struct.Struct("=i?")  # of init's message: the program's wait status, whether processes outlived it


def keep(request: dict, control: socket.socket, has: Walls, proc: int | None, temp: str) -> dict | None:
    """Runs one program to its end; the answer, or None where the evaluator hung up at `control` meanwhile.

    proc: a descriptor of the machine's /proc. temp: where scratch folders are made where there are no namespaces.
    RuntimeError where the program could not be started.
    """
    if has.namespaces:
        return _Watch(request, walls.SCRATCH, has, proc, control).run()
    scratch = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-", dir=temp))
    try:
        return _Watch(request, scratch, has, proc, control).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Watch:
    """One program, from its start to its end."""

    def __init__(self, request: dict, scratch: str, has: Walls, proc: int | None, control: socket.socket):
        self.request, self.scratch, self.has, self.proc, self.control = request, scratch, has, proc, control
        self.kept = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray(), "status": bytearray()}
        self.read_bytes = 0
        self.refused: list[str] = []
        self.nonce = os.urandom(16)
        self.confined = False  # whether the program was behind its limits before it ran

    def run(self) -> dict | None:
        """The answer; None where the evaluator went away meanwhile."""
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "report", "status", "alive")}
        door, door_inside = socket.socketpair()
        self.init = walls.fork_into_room() if self.has.namespaces else os.fork()
        if self.init == 0:
            _be_init(self, pipes, door_inside)
        door_inside.close()
        self.sources = {}  # descriptor -> what it is
        for name, (read, write) in pipes.items():
            os.close(read if name == "alive" else write)
            if name != "alive":
                os.set_blocking(read, False)
                self.sources[read] = name
        self.sources |= {door.fileno(): "door", self.control.fileno(): "control"}
        self.door = door
        why = self._watch(time.monotonic() + self.request["timeout"])
        self._end_all()
        self._open_door()
        for fd, name in self.sources.items():  # all writers have ended: what is left in the pipes is all there is
            while name in self.kept and self._read(fd, name):
                pass
            if name not in ("control", "door"):
                os.close(fd)
        door.close()
        os.close(pipes["alive"][1])
        return None if why == "gone" else self._answer(why)

    def _watch(self, deadline: float) -> Outcome | str | None:
        """Until the program has ended (None), or must be: the outcome; or "gone"."""
        self.poller = select.poll()
        for fd in self.sources:
            self.poller.register(fd, select.POLLIN)
        looked = time.monotonic()
        while True:
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
                    return "gone"
                if name == "door":
                    self.poller.unregister(fd)
                    self._open_door()
                elif name == "listener" and event & select.POLLIN:
                    self._refuse(fd)
                elif name == "listener":
                    self.poller.unregister(fd)  # nobody is behind the filter any more
                elif not self._read(fd, name):
                    if name == "status":
                        raise RuntimeError("the sandbox could not give a program its room")
                    self.poller.unregister(fd)
            if self.kept["status"]:
                return None
            if self.read_bytes > FLOOD_BYTES:
                return Outcome.TOO_MUCH_OUTPUT

    def _open_door(self) -> None:
        if self.confined:
            return
        data, descriptors, _, _ = socket.recv_fds(self.door, 1, 1)
        self.confined = bool(data)
        for listener in descriptors:
            self.sources[listener] = "listener"
            self.poller.register(listener, select.POLLIN)

    def _refuse(self, fd: int) -> None:
        name = seccomp.refuse_next(fd)
        if name and name not in self.refused and len(self.refused) < 16:
            self.refused.append(name)

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

    # ------------------------------------------------------------------------------------------ processes

    def _memory_bytes(self) -> int:
        """What all processes of the program hold together, pages that they share counted once."""
        pids = _descendants(self.proc, self.init)
        pages = [_read_file(self.proc, f"{pid}/statm").split() for pid in pids]
        total = sum(int(p[1]) for p in pages if p) * os.sysconf("SC_PAGE_SIZE")
        if total <= self.request["memory_mb"] << 20:
            return total  # the exact sum, which takes the kernel longer, is no more than this
        exact = [_read_file(self.proc, f"{pid}/smaps_rollup").partition(b"\nPss:")[2].split() for pid in pids]
        return sum(int(p[0]) << 10 for p in exact if p)

    def _end_all(self) -> None:
        """Kills what is there. With namespaces that is init, and the kernel sees to the rest before it is reaped."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.init, signal.SIGKILL)
        os.waitpid(self.init, 0)
        if not self.has.namespaces:
            _end_orphans(self.proc)

    # --------------------------------------------------------------------------------------------- answer

    def _answer(self, why: Outcome | None) -> dict:
        status = bytes(self.kept["status"])
        code, left_behind = _STATUS.unpack(status) if len(status) == _STATUS.size else (0, False)
        outcome, detail = why, ""
        stdout, stderr = (self.kept[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
        if why is None:
            if not self.confined:
                raise RuntimeError(f"the sandbox could not start a program: {stderr}")
            outcome, detail = self._from_report(os.waitstatus_to_exitcode(code))
        return {
            "outcome": outcome,
            "detail": detail,
            "stdout": stdout,
            "stderr": stderr,
            "refused": self.refused,
            "left_behind": left_behind,
        }

    def _from_report(self, code: int) -> tuple[Outcome, str]:
        """Of a program that ended by itself: by its exit code (negative: a signal), and what was reported before."""
        if code == -signal.SIGXCPU:
            return Outcome.TIMED_OUT, "of CPU"
        if code < 0:
            known = -code in set(signal.Signals)  # not all real-time signals have names
            return Outcome.KILLED, signal.Signals(-code).name if known else f"signal {-code}"
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
    found, queue = [], [pid]
    while queue and proc is not None:
        pid = queue.pop()
        for task in _read_file(proc, f"{pid}/task", listing=True):
            children = [int(p) for p in _read_file(proc, f"{pid}/task/{task}/children").split()]
            found += children
            queue += children
    return found


def _end_orphans(proc: int | None) -> None:
    """Kills and reaps all children of this process, which adopts those whose parents have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _descendants(proc, os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.001)


def _read_file(proc: int, path: str, listing: bool = False):
    """The bytes of a file below /proc, or the names in a folder; nothing where it has gone."""
    try:
        fd = os.open(path, os.O_RDONLY, dir_fd=proc)
    except OSError:
        return [] if listing else b""
    try:
        return os.listdir(fd) if listing else os.read(fd, 1 << 16)
    except OSError:
        return [] if listing else b""
    finally:
        os.close(fd)


def _be_init(watch: _Watch, pipes: dict, door: socket.socket) -> NoReturn:
    """Starts the program and waits for its end. In a namespace this is process 1: orphans become its children."""
    try:
        # What process 1 has no handler for its namespace cannot send to it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.close(pipes["alive"][1])
        os.setsid()
        die_with_parent()
        if watch.has.namespaces:
            walls.furnish_room()
        if select.select([pipes["alive"][0]], [], [], 0)[0]:
            os._exit(1)  # the worker ended before it could take this process with it
        me, child = os.getpid(), os.fork()
        if child == 0:
            _be_program(watch, pipes, door, me)
        status = None
        while status is None:
            pid, ended = os.wait()
            status = ended if pid == child else None
        os.write(pipes["status"][1], _STATUS.pack(status, _has_children()))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _be_program(watch: _Watch, pipes: dict, door: socket.socket, init: int) -> NoReturn:
    try:
        if not watch.has.namespaces:  # with them, the end of process 1 is the end of all
            die_with_parent()
            if os.getppid() != init:
                os._exit(1)
        os.dup2(pipes["stdout"][1], 1)
        os.dup2(pipes["stderr"][1], 2)
        program.become(watch.request, watch.scratch, watch.nonce, pipes["report"][1], door, watch.has)
    except BaseException:  # such as a limit that leaves no room for an interpreter: the keeper reads it as stderr
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _has_children() -> bool:
    """Whether any are still running."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True

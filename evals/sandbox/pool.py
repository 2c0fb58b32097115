"""The evaluator's side: workers that are started when needed, at most as many as there are cores."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from evals.sandbox.isolation import SCRATCH
from evals.sandbox.result import Outcome, Result
from nanochat_jax.errors import UserError

_ROOT = str(Path(__file__).resolve().parents[2])
_START = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); from evals.sandbox.forkserver import main; del sys.path[0]; main()"
)
# The program's environment too. Every arena, and every pool of threads, would reserve address space.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": SCRATCH, "TMPDIR": SCRATCH, "LANG": "C.UTF-8"}
_ENVIRONMENT |= {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_warn = logging.getLogger(__name__).warning
_PATIENCE = 30.0  # seconds beyond a program's own, until a worker that does not answer is given up


class Pool(contextlib.AbstractContextManager):
    """Runs programs, from any thread, which may have to wait. `with Pool() as pool`, or close() at the end.

    policy: `auto` takes the layers that the machine allows and says once what is missing; `required` raises UserError
    where any is. without: layers that are not tried (namespaces, seccomp).
    """

    def __init__(self, policy: str = "auto", log: Callable[[str], None] = _warn, without: Sequence[str] = ()):
        self.policy, self.log = policy, log
        self.missing = dict.fromkeys(without, "not tried")  # {layer: why}, complete after prepare() or a program
        self._said = False
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._cores = threading.BoundedSemaphore(os.cpu_count() or 1)  # more at once would only run out of time

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def prepare(self) -> None:
        """Starts a worker, so that what is missing is known before the first program. UserError as the policy says."""
        self._idle.append(self._take())

    def run(self, source: str, timeout: float, memory_mb: int) -> Result:
        """As `evals.sandbox.run_program`. RuntimeError where the sandbox itself fails."""
        request = {"source": source, "timeout": timeout, "memory_mb": memory_mb}
        with self._cores:
            for fresh in (False, True):  # somebody may have killed a worker
                worker = self._take(fresh)
                try:
                    answer = worker.ask(request)
                except BaseException:  # such as Ctrl-C: the program must not run on
                    worker.close()
                    raise
                if answer is not None:
                    self._idle.append(worker)
                    answer |= {"outcome": Outcome(answer["outcome"]), "refused": tuple(answer["refused"])}
                    return Result(**answer)
                worker.close()
        raise RuntimeError("the sandbox's worker ended without an answer, twice; its reason is on stderr")

    def _take(self, fresh: bool = False) -> "_Worker":
        while True:
            with self._lock:
                self._apply_policy()
                if self._idle and not fresh:
                    return self._idle.pop()
                without = tuple(self.missing)
            worker = _Worker(without)
            if not worker.missing:
                return worker
            worker.close()
            with self._lock:
                self.missing |= worker.missing

    def _apply_policy(self) -> None:
        reasons = ", ".join(f"{name} ({why})" for name, why in self.missing.items())
        if reasons and self.policy == "required":
            raise UserError(
                f"evals.sandbox=required, but programs that a model wrote would run without {reasons}; run where user "
                "namespaces and seccomp are allowed, or set evals.sandbox=auto"
            )
        if reasons and not self._said:
            self._said = True
            self.log(f"programs that a model wrote run without {reasons}: what is left stops accidents, not malice")


class _Worker:
    """A process of `forkserver`, and the socket to it. missing: {layer: why it is not to be had}, if it was tried."""

    def __init__(self, without: Sequence[str]):
        self._control, theirs = socket.socketpair()
        self._answers = self._control.makefile("rb")
        options = json.dumps({"temp": tempfile.gettempdir(), "without": without})
        command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", _START, str(theirs.fileno()), options]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=_ENVIRONMENT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in the terminal is for the evaluator
            )
        started = self._receive(_PATIENCE)
        if started is None:
            self.close()
            raise RuntimeError("the sandbox's worker did not start; its reason is on stderr")
        self.missing: dict[str, str] = started["missing"]

    def ask(self, request: dict) -> dict | None:
        """The answer, None where the worker has ended."""
        try:
            self._control.sendall(json.dumps(request).encode() + b"\n")
            return self._receive(request["timeout"] + _PATIENCE)
        except ConnectionError:
            return None

    def _receive(self, seconds: float) -> dict | None:
        self._control.settimeout(seconds)
        line = self._answers.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        self._answers.close()
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

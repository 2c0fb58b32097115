"""Runs a program that a model wrote, and says what became of it.

    result = run_program(source, timeout=5.0, memory_mb=512)
    result.ok, str(result)            # False, "file refused: FileNotFoundError: ... '/etc/passwd'"

    evaluator ──socket── worker (an isolated interpreter) ── init ── program

The evaluator holds JAX's threads and so must not fork. It starts workers as fresh interpreters (`pool`, `forkserver`),
at most as many as there are cores. A worker enters user, mount, network, IPC and host-name namespaces once
(`isolation`). For each program it forks a process namespace and an empty scratch folder, which end with the program
(`supervisor`). The program has hard limits on memory, CPU, file size, processes and open files, no capabilities
(`program`), and a filter of system calls that tells the supervisor what was refused (`seccomp`). The supervisor limits
time, output and the memory of all its processes together; control groups would do the last, but an evaluator can
rarely make one below its own.

Where the kernel forbids namespaces or the filter (containers often do), what is left is used, with an audit hook in
the program's own interpreter (`audit`): that stops accidents and not malice. The log says so once;
`evals.sandbox=required` refuses to run then.

What no sandbox gives: the tests run in the program's own process, and code that knows this package can report that it
passed. And a defect of the kernel is a way out.
"""

import atexit
import threading
from collections.abc import Callable

from evals.sandbox.result import Outcome, Result

__all__ = ["Outcome", "Result", "prepare", "run_program"]
_default = None
_lock = threading.Lock()


def run_program(source: str, timeout: float = 5.0, memory_mb: int = 512) -> Result:
    """Runs Python `source` for at most `timeout` seconds, in `memory_mb` MiB for each process and for all together.

    May be called from any thread. A program that leaves early, even with sys.exit(0), has not passed: the tests at its
    end have not run then.
    """
    return _pool().run(source, timeout, memory_mb)


def prepare(policy: str, log: Callable[[str], None]) -> None:
    """Starts the first worker. policy: `auto`, or `required`: UserError, now and later, where a layer is missing."""
    pool = _pool()
    pool.policy, pool.log = policy, log
    pool.prepare()


def _pool():
    from evals.sandbox.pool import Pool  # not at the top: the worker imports this package too, and stays small

    global _default
    with _lock:
        if _default is None:
            _default = Pool()
            atexit.register(_default.close)
        return _default

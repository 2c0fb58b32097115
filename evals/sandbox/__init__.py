"""Runs a program that a model wrote, and says what became of it.

    result = run_program(source, timeout=5.0)
    result.ok, str(result)            # False, "file refused: FileNotFoundError: ... '/etc/passwd'"

    evaluator ──socket── worker (an isolated interpreter) ── init ── program

The evaluator has JAX's threads and so must not fork: it starts workers as fresh interpreters (`pool`, `forkserver`). A
worker enters namespaces once (`isolation`), and for each program forks a process namespace and an empty scratch folder,
which end with the program; it limits time, output and the memory of all processes together (`supervisor`). The program
has limits of its own, no capabilities (`program`), and a filter of system calls that names those refused (`seccomp`).
Where the kernel forbids namespaces or the filter, an audit hook in the program's interpreter takes their place. What
this protects from, and what no sandbox does: evals/README.md.
"""

import atexit
import threading
from collections.abc import Callable

from evals.sandbox.result import Outcome, Result

__all__ = ["Outcome", "Result", "prepare", "run_program"]
MEMORY_MB = 512
_default = None
_lock = threading.Lock()


def run_program(source: str, timeout: float = 5.0) -> Result:
    """Runs Python `source` for at most `timeout` seconds, in MEMORY_MB MiB for each process and for all together. Any
    thread may call it. A program that leaves early, even by sys.exit(0), has not passed: tests at its end have not run.
    """
    return _pool().run(source, timeout, MEMORY_MB)


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

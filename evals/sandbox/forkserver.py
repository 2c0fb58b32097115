"""The worker: an interpreter with common modules loaded, isolated once, that forks a child for each program.

    python -I -B -c "..." CONTROL_FD OPTIONS

Requests and answers are lines of JSON over the socket to the evaluator, and the worker ends when that socket does.
"""

import contextlib
import gc
import importlib
import json
import os
import socket
import sys
from pathlib import Path

from evals.sandbox import isolation, linux, program, seccomp, supervisor
from nanochat_jax.processes import prctl

# What programs like to import. Loaded already it costs them nothing, but each module adds to the cost of a fork.
_PRELOADED = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "functools", "hashlib", "heapq", "itertools", "json"),
    *("math", "operator", "random", "re", "string", "threading", "time", "typing"),
)


def main() -> None:
    """argv: the control socket's descriptor, and {"temp": folder, "without": [layers that are not to be tried]}."""
    control, options = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    sys.argv[:] = [program.NAME]
    os.umask(0o022)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this goes before the evaluator
    for name in _PRELOADED:
        importlib.import_module(name)
    missing, proc = {}, None
    for name, isolate in (("seccomp", seccomp.check), ("namespaces", isolation.enter)):
        try:
            if name not in options["without"]:
                proc = isolate()
        except (OSError, AttributeError) as e:  # AttributeError: a C library that is not Linux's
            missing[name] = getattr(e, "strerror", None) or str(e)
    _send(control, {"missing": missing})
    if missing:
        return  # half of an isolation cannot be undone: the pool starts another worker, without
    layers = isolation.Layers(*(name not in options["without"] for name in isolation.Layers._fields))
    if not layers.namespaces:
        prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        if os.path.isdir("/proc"):
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, pages that a program shares
    with contextlib.suppress(EOFError, ConnectionError):  # the evaluator has gone
        for line in control.makefile("rb"):
            _send(control, vars(supervisor.run(json.loads(line), control, layers, proc, options["temp"])))


def _send(control: socket.socket, message: dict) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")  # ASCII, so that also half a surrogate pair arrives

"""A worker: an interpreter that is warm, stands behind the walls, and forks a child for each program.

    python -I -B -c "..." CONTROL_FD OPTIONS

It is started afresh, and never a fork of the evaluator, whose JAX has threads. It ends when the evaluator does, because
the socket between them then has an end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import sys
from pathlib import Path

from evals.sandbox import keeper, linux, program, seccomp, walls, wire

# What programs like to import; already loaded it costs them nothing, but each adds to the cost of a fork.
_WARM = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "functools", "hashlib", "heapq", "itertools", "json"),
    *("math", "operator", "random", "re", "string", "threading", "time", "typing"),
)


def main() -> None:
    """argv: the control socket's descriptor, and {"temp": folder, "without": [walls that are not to be tried]}."""
    control, options = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    sys.argv[:] = [program.NAME]
    os.umask(0o022)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this goes before the evaluator
    for name in _WARM:
        importlib.import_module(name)
    missing, proc = {}, None
    for name, go in (("seccomp", seccomp.check), ("namespaces", walls.enter)):
        try:
            if name not in options["without"]:
                proc = go()
        except (OSError, AttributeError) as e:  # AttributeError: a C library that is not Linux's
            missing[name] = getattr(e, "strerror", None) or str(e)
    wire.send(control, {"missing": missing})
    if missing:
        return  # half a wall cannot be taken down: the pool starts another worker, without
    has = walls.Walls(**{name: name not in options["without"] for name in walls.Walls._fields})
    if not has.namespaces:
        linux.adopt_orphans()
        if os.path.isdir("/proc"):
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, pages that a program shares
    while (request := wire.receive(control)) is not None:
        answer = keeper.keep(request, control, has, proc, options["temp"])
        if answer is None:
            return  # the evaluator went away
        wire.send(control, answer)

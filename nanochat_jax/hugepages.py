"""Huge pages for the host's large buffers: a step on a CPU then takes 7 % less time.

XLA takes new memory for the intermediate arrays of every step: at depth 4 and 8 x 512 tokens 190,000 pages of 4 KB.
Linux gives pages of 2 MB to whoever asks for them, and glibc asks where its tunable says so when the process starts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """What to add to the environment of a process before it starts; empty where that would change nothing."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _MODE.is_file() or "[madvise]" not in _MODE.read_text():
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:{_TUNABLE}=1".lstrip(":")}


def restart() -> None:
    """Runs this process's own command again in its place with `environment`; returns where there is nothing to add."""
    more = environment()
    if more:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})

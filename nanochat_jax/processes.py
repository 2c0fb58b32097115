"""How processes start and end: with huge pages for their large buffers, and never later than their parent.

Huge pages make a step on a CPU take 7 % less time: XLA takes new memory for the intermediate arrays of every step, at
depth 4 and 8 x 512 tokens 190,000 pages of 4 KB. Linux gives pages of 2 MB to whoever asks for them, and glibc asks
where its tunable says so when the process starts.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PR_SET_PDEATHSIG = 1


def huge_pages_environment() -> dict[str, str]:
    """What to add to the environment of a process before it starts; empty where that would change nothing."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _MODE.is_file() or "[madvise]" not in _MODE.read_text():
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:{_TUNABLE}=1".lstrip(":")}


def restart_with_huge_pages() -> None:
    """Runs this process's own command again in its place; returns where `huge_pages_environment` is empty, or where
    this user may not start it, as where the user was changed since it started."""
    if more := huge_pages_environment():
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})


def die_with_parent() -> None:
    """Linux kills this process when its parent ends; a parent that has ended already must be noticed otherwise."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    """The system call prctl(2). OSError where it fails; does nothing where the system is not Linux."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *(ctypes.c_ulong(v) for v in (value, 0, 0, 0))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, in 10^9 bytes."""
    import resource  # here: Windows has none, and a command says so

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

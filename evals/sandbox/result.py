"""What became of a program, by name."""

import errno
import os
import traceback
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    PASSED = "passed"  # it ran past its last line and ended
    FAILED = "failed"  # by an exception
    LEFT_EARLY = "left early"  # it ended before its last line, whatever its exit status
    TIMED_OUT = "timed out"
    KILLED = "killed by signal"
    OUT_OF_MEMORY = "out of memory"
    TOO_MUCH_OUTPUT = "too much output"
    PROCESS_LIMIT = "process limit"
    DISK_LIMIT = "disk limit"
    OPEN_FILES_LIMIT = "too many open files"
    NETWORK_REFUSED = "network refused"
    FILE_REFUSED = "file refused"
    CALL_REFUSED = "system call refused"
    FORGED = "forged report"  # something else than the sandbox wrote what the sandbox writes


@dataclass(frozen=True)
class Result:
    outcome: Outcome
    detail: str  # the exception's last line, the signal or the like
    stdout: str  # cut, as stderr
    stderr: str
    refused: tuple[str, ...] = ()  # system calls and audit events, also where the program went on after that
    left_behind: bool = False  # processes of it were still there when it had ended; they were killed

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.PASSED

    def __str__(self) -> str:
        """One line, such as `file refused: FileNotFoundError: ...` or `passed (refused: mount)`."""
        notes = [f"refused: {', '.join(self.refused)}"] if self.refused else []
        notes += ["processes outlived it"] if self.left_behind else []
        return self.outcome + (f": {self.detail}" if self.detail else "") + (f" ({'; '.join(notes)})" if notes else "")


_LIMITS = {
    errno.ENOMEM: Outcome.OUT_OF_MEMORY,
    errno.EAGAIN: Outcome.PROCESS_LIMIT,
    **dict.fromkeys((errno.EFBIG, errno.ENOSPC, errno.EDQUOT), Outcome.DISK_LIMIT),
    errno.EMFILE: Outcome.OPEN_FILES_LIMIT,
    errno.EROFS: Outcome.FILE_REFUSED,
}
_UNREACHABLE = (errno.ENOENT, errno.EPERM, errno.EACCES, errno.EXDEV, errno.ELOOP)


def of_exception(e: BaseException, scratch: str) -> tuple[Outcome, str]:
    """The outcome that an uncaught exception stands for, and its last line."""
    lines = "".join(traceback.format_exception_only(e)).strip().splitlines()
    detail = lines[-1][:500] if lines else type(e).__name__
    if isinstance(e, MemoryError):
        return Outcome.OUT_OF_MEMORY, detail
    if isinstance(e, RuntimeError) and "can't start new thread" in str(e):
        return Outcome.PROCESS_LIMIT, detail
    if isinstance(e, OSError):
        if e.errno in _LIMITS:
            return _LIMITS[e.errno], detail
        if e.errno in _UNREACHABLE and any(is_outside(p, scratch) for p in (e.filename, e.filename2)):
            return Outcome.FILE_REFUSED, detail
    return Outcome.FAILED, detail


def is_outside(path: object, scratch: str) -> bool:
    """Whether a path leads out of the folder. Descriptors do not: they were judged when they were opened."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    path = os.path.realpath(os.fsdecode(path))
    return path != scratch and not path.startswith(scratch + os.sep)


def could_be_refusal(e: BaseException) -> bool:
    """Whether an exception may come of a refused call: libraries wrap EPERM, and a resolver has numbers of its own."""
    return isinstance(e, OSError) and (e.errno in (None, errno.EPERM, errno.EACCES) or e.errno < 0)


def with_refusals(outcome: Outcome, refused: list[str], could_be: bool) -> Outcome:
    """The outcome where the exception `could_be` that of a refused call."""
    if not refused or not could_be:
        return outcome
    network = any(name.startswith("socket") for name in refused)
    return Outcome.NETWORK_REFUSED if network else Outcome.CALL_REFUSED

"""What every command does with errors: those that a person can mend become one line and an exit status.

    @command
    def main(argv: Sequence[str] | None = None) -> int: ...

Anything else that is raised is a defect and shows its traceback.
"""

import argparse
import errno
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat_jax.errors import START_AGAIN, Interrupted, UserError

MISTAKE, DEFECT, CTRL_C, NO_READER = 2, 1, 130, 141  # exit statuses; the last two are 128 + SIGINT and SIGPIPE
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
FAILED = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, getattr(errno, "ESTALE", errno.EIO))  # no path's fault
WRONG_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.ENODEV)
WRONG_IF_GIVEN = (errno.ENOENT,)  # of any other path than a person gave, it is a defect
NO_DEVICE = "Unable to initialize backend"  # how jax begins to say that a device does not start


def command(main: Callable[..., int | None] | None = None, *, resumes: str = "") -> Callable:
    """`main`, which then returns an exit status and never raises what a person can mend: UserError, Interrupted, a full
    or read-only disk, a path that cannot be, a device that jax cannot start, a closed pipe, Ctrl-C. 0 where `main`
    returns None.

    resumes: for Ctrl-C, from where the same command resumes.
    """
    if main is None:
        return functools.partial(command, resumes=resumes)

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            _prepare(sys.argv[1:] if argv is None else argv)
            status = main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()  # here, where a closed pipe can still be caught
            return status or 0
        except BrokenPipeError:  # nobody reads on, as with `| head`
            _flush_or_drop()
            return NO_READER
        except KeyboardInterrupt:
            return _say(f"interrupted; the same command resumes {resumes}" if resumes else "interrupted", CTRL_C)
        except Interrupted as e:
            return _say(f"interrupted: {e}", START_AGAIN)
        except Exception as e:
            if (line := explained(e, sys.argv[1:] if argv is None else argv)) is None:
                raise
            _flush_or_drop()
            return _say(f"error: {line}", DEFECT if isinstance(e, FloatingPointError) else MISTAKE)

    return guarded


def _prepare(argv: Sequence[str]) -> None:
    """What no command can do without. UserError."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # what is not text in the terminal's encoding is no reason to end
            stream.reconfigure(errors="replace")
    try:
        for module in ("fcntl", "resource"):
            importlib.import_module(module)
        here = os.getcwd()
    except ImportError as e:
        raise UserError(f"this needs Linux, macOS or WSL: Python has no module {e.name} here") from None
    except FileNotFoundError:
        raise UserError("the current folder is gone; change to another one") from None
    if "" in argv or any(a.startswith("--") and a.endswith("=") for a in argv):
        raise UserError("an argument is empty; leave it out, or give it a value (a shell variable may be unset)")
    for name in (*argv, here):
        if not _is_text(name):  # libraries in C++ take no such path
            mend = "rename it" if sys.getfilesystemencoding() == "utf-8" else "set PYTHONUTF8=1"
            raise UserError(f"{name!a} is not text in {sys.getfilesystemencoding()}; {mend}")


def _is_text(text: str) -> bool:
    """Whether it has no surrogates: Python's stand-ins for bytes that it cannot decode."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def explained(e: BaseException, argv: Sequence[str] = ()) -> str | None:
    """What a person who gave the arguments `argv` should do about an exception, in one line; None for a defect."""
    if isinstance(e, (UserError, FloatingPointError)):  # the latter: a loss that is not finite; it says where
        return " ".join(str(e).split())
    if why := _no_device(e):
        if asked := os.environ.get("JAX_PLATFORMS"):
            mend = f"JAX_PLATFORMS={asked} asks for it, and here is {_devices()}: leave that out"
        else:
            mend = "set JAX_PLATFORMS=cpu to do without"
        return f"jax cannot start a device ({why}); {mend}, or install its libraries (for a GPU: --extra gpu)"
    if isinstance(e, UnicodeEncodeError) and (e.encoding == "ascii" or not _is_text(e.object)):  # a file's name
        return (
            f"{e.object[:200]!a} cannot be written in {e.encoding}; set PYTHONUTF8=1, or rename the file of that name"
        )
    number, path = _system_error(e)
    name = f" {path}" if path else ""
    if number in FULL:
        return f"cannot write{name}: the disk is full; make room and give the same command again"
    if number in REFUSED:
        return f"cannot open or write{name} ({os.strerror(number)}); take another folder, or change its permissions"
    if number in FAILED:
        return f"cannot read or write{name} ({os.strerror(number)}); mend that and give the same command again"
    if number in WRONG_PATH or number in WRONG_IF_GIVEN and path and _is_given(path, argv):
        return f"cannot open or write{name} ({os.strerror(number)}); take another path"
    return None


def _no_device(e: BaseException) -> str:
    """Why jax cannot start a device; "" where that is not the error."""
    if isinstance(e, RuntimeError) and NO_DEVICE in str(e):
        return str(e).splitlines()[0].split(" (set JAX_PLATFORMS")[0]
    frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    if isinstance(e, AssertionError) and frames and frames[-1].f_code.co_filename.endswith("xla_bridge.py"):
        return "no NVIDIA GPU is visible"  # JAX_PLATFORMS=cuda then fails in an assertion without words
    return ""


def _devices() -> str:
    """What jax finds where it is asked for nothing."""
    import jax

    try:
        jax.config.update("jax_platforms", None)
        return ", ".join(sorted({device.device_kind for device in jax.devices()}))
    except (RuntimeError, AssertionError):
        return "none"


def _system_error(e: BaseException) -> tuple[int, str]:
    """(errno, path) of what the system refused, 0 and "" where unknown. Libraries, and child processes whose traceback
    arrives as text, keep the words and lose the number."""
    if isinstance(e, OSError) and e.errno:
        return e.errno, os.fsdecode(e.filename) if isinstance(e.filename, (str, bytes)) else ""
    text = str(e)
    if found := re.findall(r"\[Errno (\d+)\] [^:\n]*(?:: '([^'\n]*)')?", text):
        return int(found[-1][0]), found[-1][1]
    return next((number for number in (*FULL, errno.EROFS, *FAILED) if os.strerror(number) in text), 0), ""


def _is_given(path: str, argv: Sequence[str]) -> bool:
    """Whether a path is an argument, or the value of one (key=value), or above it, or a temporary file beside it."""
    tried = Path(path).absolute()
    given = [Path(argument.partition("=")[2] or argument).absolute() for argument in argv]
    return any(tried in (g, *g.parents) or (tried.parent == g.parent and g.name in tried.name) for g in given)


def _flush_or_drop() -> None:
    """What stdout cannot take is dropped: Python would flush it once more when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def count(text: str, least: int = 0) -> int:
    """An argparse type: a whole number of 0 or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)


def positive(text: str) -> int:
    return count(text, 1)

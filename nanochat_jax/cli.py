"""The one door of every command: what ends a program and is no defect becomes one line and an exit status.

    @command
    def main(argv: Sequence[str] | None = None) -> int: ...

Anything else that is raised is a defect and shows its traceback.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable

from nanochat_jax.errors import START_AGAIN, Interrupted, UserError

MISTAKE, DEFECT, CTRL_C, NO_READER = 2, 1, 130, 141  # exit statuses; the last two are 128 + SIGINT and SIGPIPE
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_DEVICE = "Unable to initialize backend"  # how jax begins to say that a device does not start


def command(main: Callable[..., int | None] | None = None, *, resumes: str = "") -> Callable:
    """`main`, which then returns an exit status and never raises what a person can mend: UserError, Interrupted, a full
    or read-only disk, a device that jax cannot start, a closed pipe, Ctrl-C. 0 where `main` returns None.

    resumes: for Ctrl-C, from where the same command goes on.
    """
    if main is None:
        return functools.partial(command, resumes=resumes)

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> int:
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()  # here, where a closed pipe can still be caught
            return status or 0
        except BrokenPipeError:  # nobody reads on, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
            return NO_READER
        except KeyboardInterrupt:
            return _say(f"interrupted; the same command goes on {resumes}" if resumes else "interrupted", CTRL_C)
        except Interrupted as e:
            return _say(f"interrupted: {e}", START_AGAIN)
        except Exception as e:
            if (line := explained(e)) is None:
                raise
            return _say(f"error: {line}", DEFECT if isinstance(e, FloatingPointError) else MISTAKE)

    return guarded


def explained(e: BaseException) -> str | None:
    """What a person should do about an exception, in one line; None where it is a defect."""
    if isinstance(e, (UserError, FloatingPointError)):  # the latter: a loss that is not finite; it says where
        return " ".join(str(e).split())
    text = str(e)
    number = e.errno if isinstance(e, OSError) else None
    name = f" {e.filename}" if isinstance(e, OSError) and e.filename else ""
    if number in FULL or any(os.strerror(n) in text for n in FULL):  # libraries keep the words and lose the number
        return f"cannot write{name}: the disk is full; make room and give the same command again"
    if number in REFUSED:
        return f"cannot open or write{name} ({os.strerror(number)}); take another folder, or change its permissions"
    if isinstance(e, RuntimeError) and NO_DEVICE in text:
        asked = os.environ.get("JAX_PLATFORMS")
        mend = f"JAX_PLATFORMS={asked} asks for it: leave that out" if asked else "set JAX_PLATFORMS=cpu to do without"
        return f"jax cannot start a device ({text.splitlines()[0]}); {mend}, or install its libraries (--extra gpu)"
    return None


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    return _whole(text, 1)


def count(text: str) -> int:
    """An argparse type: a whole number of 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)

"""Linux system calls that Python's standard library does not have, by ctypes. Errors are OSError."""

import ctypes
import os
import signal
from collections.abc import Callable

from nanochat_jax.processes import prctl

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)  # a child that is forked by it holds the interpreter's lock too

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_THREAD = 0x00010000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # on every architecture but the oldest
_CLONE = {"x86_64": 56, "aarch64": 220}

PR_SET_CHILD_SUBREAPER = 36  # descendants whose parents end become children of this process
PR_SET_NO_NEW_PRIVS = 38  # no setuid bit or file capability has an effect in this process and what it starts
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8
_CAPABILITY_VERSION_3 = 0x20080522


def call(function: str, *args, library: ctypes.CDLL = _libc, name: str = "") -> int:
    """A function of the C library with integers, bytes or ctypes pointers; `name` stands for it in the error."""
    result = getattr(library, function)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name or function}: {os.strerror(number)}")
    return result


def fork_init() -> int:
    """fork() whose child is process 1 of a process namespace of its own, with a copy of the mounts.

    Python's handlers of fork do not run and the C library does not learn the child's number: it should do little more
    than to fork again. The caller must have one thread. (A process can unshare its children's namespace only once.)
    """
    number, flags = _CLONE[os.uname().machine], CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | signal.SIGCHLD
    return call("syscall", number, flags, 0, 0, 0, 0, library=_libc_with_gil, name="clone")


def run_in_child(name: str, work: Callable[[], object]) -> Callable[[], None]:
    """Starts `work` in a forked child. Returns a function that waits for its end and raises the OSError it met."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except OSError as e:
            code = e.errno or 1
        finally:
            os._exit(code)

    def join() -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise OSError(code, f"{name}: {os.strerror(code)}")

    return join


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    call("mount", *map(os.fsencode, (source, target, kind)), flags, data.encode(), name=f"mount {target}")


def restrict_mount(target: str, attributes: int, recursive: bool) -> None:
    """Adds MOUNT_ATTR_* to a mount, and to those below it. Linux 5.12."""
    attr = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr: set, clear, propagation, userns_fd
    args = _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE if recursive else 0, attr, ctypes.sizeof(attr)
    call("syscall", _MOUNT_SETATTR, *args, name="mount_setattr")


def switch_user(uid: int, gid: int) -> None:
    """Takes the ids and keeps the capabilities that a change from uid 0 would take away."""
    prctl(_PR_SET_KEEPCAPS, 1)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _set_capabilities(2**32 - 1)
    prctl(_PR_SET_DUMPABLE, 1)  # a change of ids takes it; the kernel's /proc files need it


def drop_capabilities() -> None:
    _set_capabilities(0)
    prctl(_PR_SET_KEEPCAPS, 0)


def _set_capabilities(mask: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    high = mask & ((1 << 9) - 1)  # capabilities 32 to 40
    data = (ctypes.c_uint32 * 6)(mask, mask, 0, high, high, 0)  # effective, permitted, inheritable; low, then high
    call("capset", header, data)

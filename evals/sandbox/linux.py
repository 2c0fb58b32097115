"""Linux system calls that Python's standard library does not have, by ctypes. Errors are OSError."""

from __future__ import annotations

import ctypes
import os
import signal

from nanochat_jax.processes import prctl

_libc = ctypes.CDLL(None, use_errno=True)
_holding_the_lock = ctypes.PyDLL(None, use_errno=True)  # of the interpreter, which a child then holds too

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_THREAD = 0x00010000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

# These numbers are the same on every architecture but the oldest.
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CLONE = {"x86_64": 56, "aarch64": 220}


def _check(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *args) -> int:
    """System call `number` with integers, bytes or ctypes pointers; `what` names it in the error."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _check(what, _libc.syscall(ctypes.c_long(number), *wide))


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def gain_nothing_from_now_on() -> None:
    """No setuid bit or file capability has an effect in this process and what it starts."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def unshare(flags: int) -> None:
    _check("unshare", _libc.unshare(flags))


def fork_into(flags: int) -> int:
    """fork() whose child is in new namespaces (CLONE_NEW*); with CLONE_NEWPID it is process 1 there.

    Python's handlers of fork do not run and the C library does not learn the child's number: it should do little more
    than to fork again. The caller must have one thread. (A process can unshare its children's namespace only once.)
    """
    args = [ctypes.c_long(a) for a in (_CLONE[os.uname().machine], flags | signal.SIGCHLD, 0, 0, 0, 0)]
    return _check("clone", _holding_the_lock.syscall(*args))


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    args = (source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(f"mount {target}", _libc.mount(*args))


def bind(source: str, target: str) -> None:
    args = (os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(MS_BIND | MS_REC), None)
    _check(f"mount {target}", _libc.mount(*args))


def restrict_mount(target: str, attributes: int, recursive: bool) -> None:
    """Adds MOUNT_ATTR_* to a mount, and to those below it. Linux 5.12."""
    attr = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr: set, clear, propagation, userns_fd
    flags = _AT_RECURSIVE if recursive else 0
    syscall("mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, attr, ctypes.sizeof(attr))


def pivot_root(new: str, old: str) -> None:
    syscall("pivot_root", _PIVOT_ROOT[os.uname().machine], os.fsencode(new), os.fsencode(old))


def unmount(target: str) -> None:
    _check("umount2", _libc.umount2(os.fsencode(target), MNT_DETACH))


def become(uid: int, gid: int) -> None:
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
    syscall("capset", _CAPSET[os.uname().machine], header, data)

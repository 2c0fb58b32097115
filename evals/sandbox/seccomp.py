"""The system calls that a program is refused, as a seccomp filter that tells the supervisor which one was tried.

A list of what is refused, and not of what is allowed: Python and its libraries may use anything ordinary, while what
changes the machine, reaches other processes or has been the way into kernels is refused with EPERM. Calls newer than
this file do not exist (ENOSYS). The kernel hands each refused call to the listener (SECCOMP_RET_USER_NOTIF, Linux 5.0),
so that also what `ctypes` tries is known by name.
"""

import ctypes
import errno
import fcntl
import functools
import os
import struct
import sys
from typing import NamedTuple

from evals.sandbox import linux
from nanochat_jax.processes import prctl

# name, number on x86_64, number on aarch64
_REFUSED = (
    # the network; socketpair, which asyncio needs, is no way out
    "socket 41 198, "
    # other programs: there are none inside, and none are started
    "execve 59 221, execveat 322 281, "
    # other processes, and signals that could reach process 1 of the namespace
    "ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, "
    "process_mrelease 448 448, kcmp 312 272, pidfd_getfd 438 438, pidfd_send_signal 424 424, tkill 200 130, "
    "rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, "
    # namespaces and mounts
    "unshare 272 97, setns 308 268, chroot 161 51, pivot_root 155 41, mount 165 40, umount2 166 39, "
    "mount_setattr 442 442, open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, "
    "fsmount 432 432, fspick 433 433, statmount 457 457, listmount 458 458, mknod 133 -, mknodat 259 33, "
    "name_to_handle_at 303 264, open_by_handle_at 304 265, "
    # memory that no limit counts
    "memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, "
    "semop 65 193, semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, "
    "msgctl 71 187, mq_open 240 180, mq_unlink 241 181, mlock 149 228, mlock2 325 284, mlockall 151 230, "
    # limits and shares
    "setrlimit 160 164, setpriority 141 140, ioprio_set 251 30, sched_setparam 142 118, "
    "sched_setscheduler 144 119, sched_setattr 314 274, sched_setaffinity 203 122, migrate_pages 256 238, "
    "move_pages 279 239, io_setup 206 0, "
    # large parts of the kernel that programs have no need of
    "bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426, "
    "io_uring_register 427 427, keyctl 250 219, add_key 248 217, request_key 249 218, fanotify_init 300 262, "
    "fanotify_mark 301 263, seccomp 317 277, personality 135 92, modify_ldt 154 -, lookup_dcookie 212 18, "
    "lsm_set_self_attr 460 460, uselib 134 -, ustat 136 -, sysfs 139 -, "
    # the machine
    "reboot 169 142, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273, "
    "delete_module 176 106, iopl 172 -, ioperm 173 -, swapon 167 224, swapoff 168 225, acct 163 89, "
    "quotactl 179 60, quotactl_fd 443 443, syslog 103 116, vhangup 153 58, sethostname 170 161, "
    "setdomainname 171 162, settimeofday 164 170, adjtimex 159 171, clock_settime 227 112, "
    "clock_adjtime 305 266, "
)
# Judged by an argument.
_JUDGED = "clone 56 220, kill 62 129, tgkill 234 131, prlimit64 302 261, "
_ALONE = "fork 57 -, vfork 58 -, "  # refused to a program without namespaces
_CLONE3, _LAST = 435, 462  # the same everywhere; the newest call that this file knows of


class Machine(NamedTuple):
    """arch: its AUDIT_ARCH_*. refused, judged, alone: {name: number}."""

    arch: int
    refused: dict[str, int]
    judged: dict[str, int]
    alone: dict[str, int]


def _machine(arch: int, column: int) -> Machine:
    tables = [[entry.split() for entry in table.split(", ") if entry] for table in (_REFUSED, _JUDGED, _ALONE)]
    return Machine(arch, *({row[0]: int(row[column]) for row in rows if row[column] != "-"} for rows in tables))


MACHINES = {"x86_64": _machine(0xC000003E, 1), "aarch64": _machine(0xC00000B7, 2)}

_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWCGROUP | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC
_NAMESPACES |= linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNET

_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_KILL, _ERRNO, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
# Where they stand in struct seccomp_data; of the arguments that is the low half, on a little-endian machine.
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENT_1, _AT_ARGUMENT_3 = 0, 4, 16, 32


def check() -> None:
    """OSError where no filter can be installed, or this file has no numbers for the machine. Tried in a process of
    its own: a container may forbid it, or have the one listener that there can be."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in MACHINES:
        raise OSError(f"no list of system calls for {sys.platform} on {machine}")
    build(machine, None)  # is cached, and so there in every program

    def install_it() -> None:
        prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        install(None)

    linux.run_in_child("seccomp", install_it)()


@functools.cache
def build(machine: str, alone: int | None) -> bytes:
    """The filter as an array of struct sock_filter. alone: the process id of a program without namespaces, which then
    can start no processes and signal itself only."""
    arch, refused, judged, extra = MACHINES[machine]
    ops: list[tuple[int, int, int, int]] = []  # (code, jump if true, jump if false, constant)

    def judge(number: int, tests: list[tuple[int, int, int]], found: int, otherwise: int) -> None:
        """Answers a call with `found` where any test (offset in seccomp_data, comparison, constant) holds."""
        body = []
        for offset, comparison, constant in tests:
            body += [(_LOAD, 0, 0, offset), (comparison, 0, 1, constant), (_RETURN, 0, 0, found)]
        body.append((_RETURN, 0, 0, otherwise))
        ops.extend([(_EQUAL, 0, len(body), number), *body])

    ops += [(_LOAD, 0, 0, _AT_ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _AT_NUMBER)]
    # clone3 hides its flags in memory, where a filter cannot look; the C library then takes clone.
    ops += [(_EQUAL, 1, 0, _CLONE3), (_AT_LEAST, 0, 1, _LAST + 1), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    first, new_limit = _AT_ARGUMENT_1, _AT_ARGUMENT_3
    judge(judged["prlimit64"], [(new_limit, _AT_LEAST, 1), (new_limit + 4, _AT_LEAST, 1)], _NOTIFY, _ALLOW)
    if alone is None:
        judge(judged["clone"], [(first, _ANY_BIT, _NAMESPACES)], _NOTIFY, _ALLOW)
        judge(judged["kill"], [(first, _EQUAL, 1), (first, _EQUAL, 2**32 - 1)], _NOTIFY, _ALLOW)  # init, everybody
        judge(judged["tgkill"], [(first, _EQUAL, 1)], _NOTIFY, _ALLOW)
    else:
        judge(judged["clone"], [(first, _ANY_BIT, linux.CLONE_THREAD)], _ALLOW, _NOTIFY)
        judge(judged["kill"], [(first, _EQUAL, alone)], _ALLOW, _NOTIFY)
        judge(judged["tgkill"], [(first, _EQUAL, alone)], _ALLOW, _NOTIFY)
    for number in sorted((refused if alone is None else refused | extra).values()):
        judge(number, [], _NOTIFY, _NOTIFY)
    ops.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *op) for op in ops)


def install(alone: int | None) -> int:
    """Puts this process, and what it starts, behind the filter for good. Returns the listener's descriptor."""
    machine = os.uname().machine
    filter_ = build(machine, alone)

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    program = Program(len(filter_) // 8, filter_)
    args = MACHINES[machine].refused["seccomp"], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program)
    return linux.call("syscall", *args, name="seccomp")


_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND


def refuse_next(listener: int) -> str | None:
    """Answers the call that waits at the listener with EPERM, and returns its name; None where its process ended."""
    notification = bytearray(80)  # struct seccomp_notif: id, pid, flags, then seccomp_data
    try:
        fcntl.ioctl(listener, _RECEIVE, notification)
        (key,), (number,) = struct.unpack_from("=Q", notification), struct.unpack_from("=i", notification, 16)
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", key, 0, -errno.EPERM, 0))
    except OSError:
        return None
    of = MACHINES[os.uname().machine]
    names = {number: name for name, number in (of.refused | of.judged | of.alone).items()}
    return names.get(number, f"system call {number}")

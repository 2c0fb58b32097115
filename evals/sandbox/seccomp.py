"""The system calls that a program is refused, as a seccomp filter that tells the keeper which one was tried.

A list of what is refused, and not of what is allowed: Python and its libraries may use anything ordinary, while what
changes the machine, reaches other processes or has been the way into kernels is refused with EPERM. Calls newer than
this file do not exist (ENOSYS). The kernel hands each refused call to the listener (SECCOMP_RET_USER_NOTIF, Linux 5.0),
so that also what `ctypes` tries is known by name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
import sys

from evals.sandbox import linux

# Numbers from 424 on are the same everywhere.
_COMMON = {
    **{"pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433},
    **{"pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447},
    **{"process_mrelease": 448, "statmount": 457, "listmount": 458},
    **{"lsm_set_self_attr": 460},
}
_CLONE3, _LAST = 435, 462
_X86_64 = {
    **{"shmget": 29, "shmat": 30, "shmctl": 31, "socket": 41, "semget": 64, "semop": 65, "semctl": 66, "msgget": 68},
    **{"msgsnd": 69, "msgrcv": 70, "msgctl": 71, "execve": 59, "ptrace": 101, "syslog": 103, "mknod": 133},
    **{"uselib": 134, "personality": 135, "ustat": 136, "sysfs": 139, "setpriority": 141, "sched_setparam": 142},
    **{"sched_setscheduler": 144, "mlock": 149, "mlockall": 151, "vhangup": 153, "modify_ldt": 154, "pivot_root": 155},
    **{"adjtimex": 159, "setrlimit": 160, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165},
    **{"umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171},
    **{"iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179},
    **{"sched_setaffinity": 203, "lookup_dcookie": 212, "semtimedop": 220, "clock_settime": 227},
    **{"mq_open": 240, "mq_unlink": 241, "kexec_load": 246, "add_key": 248, "request_key": 249},
    **{"keyctl": 250, "ioprio_set": 251, "migrate_pages": 256, "mknodat": 259, "unshare": 272, "move_pages": 279},
    **{"perf_event_open": 298, "fanotify_init": 300, "fanotify_mark": 301, "name_to_handle_at": 303},
    **{"open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310},
    **{"process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314, "seccomp": 317},
    **{"memfd_create": 319, "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323, "mlock2": 325},
}
_AARCH64 = {
    **{"lookup_dcookie": 18, "ioprio_set": 30, "mknodat": 33, "umount2": 39, "mount": 40, "pivot_root": 41},
    **{"chroot": 51, "vhangup": 58, "quotactl": 60, "acct": 89, "personality": 92, "unshare": 97, "kexec_load": 104},
    **{"init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116, "ptrace": 117},
    **{"sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122, "setpriority": 140, "reboot": 142},
    **{"sethostname": 161, "setdomainname": 162, "setrlimit": 164, "settimeofday": 170, "adjtimex": 171},
    **{"mq_open": 180, "mq_unlink": 181, "msgget": 186, "msgctl": 187, "msgrcv": 188, "msgsnd": 189, "semget": 190},
    **{"semctl": 191, "semtimedop": 192, "semop": 193, "shmget": 194, "shmctl": 195, "shmat": 196, "socket": 198},
    **{"add_key": 217, "request_key": 218, "keyctl": 219, "execve": 221, "swapon": 224, "swapoff": 225, "mlock": 228},
    **{"mlockall": 230, "migrate_pages": 238, "move_pages": 239},
    **{"perf_event_open": 241, "fanotify_init": 262, "fanotify_mark": 263, "name_to_handle_at": 264},
    **{"open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270},
    **{"process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "sched_setattr": 274, "seccomp": 277},
    **{"memfd_create": 279, "bpf": 280, "execveat": 281, "userfaultfd": 282, "mlock2": 284, "kexec_file_load": 294},
}
# Calls that are judged by an argument, and those that only a program without walls is refused.
_X86_64_JUDGED = {"clone": 56, "kill": 62, "tgkill": 234, "prlimit64": 302}
_AARCH64_JUDGED = {"clone": 220, "kill": 129, "tgkill": 131, "prlimit64": 261}
_X86_64_ALONE = {"fork": 57, "vfork": 58, "rt_sigqueueinfo": 129, "tkill": 200, "rt_tgsigqueueinfo": 297}
_AARCH64_ALONE = {"tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240}

# machine: (AUDIT_ARCH_*, seccomp's own number, refused, judged, refused to a program without walls)
MACHINES = {
    "x86_64": (0xC000003E, 317, _COMMON | _X86_64, _X86_64_JUDGED, _X86_64_ALONE),
    "aarch64": (0xC00000B7, 277, _COMMON | _AARCH64, _AARCH64_JUDGED, _AARCH64_ALONE),
}

_NAMESPACES = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWCGROUP
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUSER
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
)

_SET_MODE_FILTER, _GET_ACTION_AVAIL, _NEW_LISTENER = 1, 2, 8
_KILL, _ERRNO, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
_AT_NUMBER, _AT_ARCH = 0, 4  # in struct seccomp_data


def check() -> None:
    """OSError where the kernel has no filter that notifies, or this file has no numbers for the machine."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in MACHINES:
        raise OSError(f"no list of system calls for {sys.platform} on {machine}")
    action = ctypes.c_uint32(_NOTIFY)
    linux.syscall("seccomp", MACHINES[machine][1], _GET_ACTION_AVAIL, 0, ctypes.byref(action))
    build(machine, None)  # is remembered, and so there in every program


@functools.cache
def build(machine: str, alone: int | None) -> bytes:
    """The filter as an array of struct sock_filter.

    alone: the process id of a program without walls, which then can start no processes and signal itself only.
    """
    arch, _, refused, judged, extra = MACHINES[machine]
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
    first, new_limit = _argument(0), _argument(2)
    judge(judged["prlimit64"], [(new_limit, _AT_LEAST, 1), (new_limit + 4, _AT_LEAST, 1)], _NOTIFY, _ALLOW)
    if alone is None:
        judge(judged["clone"], [(first, _ANY_BIT, _NAMESPACES)], _NOTIFY, _ALLOW)
        judge(judged["kill"], [(first, _EQUAL, 1), (first, _EQUAL, 2**32 - 1)], _NOTIFY, _ALLOW)  # init, everybody
    else:
        judge(judged["clone"], [(first, _ANY_BIT, linux.CLONE_THREAD)], _ALLOW, _NOTIFY)
        judge(judged["kill"], [(first, _EQUAL, alone)], _ALLOW, _NOTIFY)
        judge(judged["tgkill"], [(first, _EQUAL, alone)], _ALLOW, _NOTIFY)
    for number in sorted((refused if alone is None else refused | extra).values()):
        judge(number, [], _NOTIFY, _NOTIFY)
    ops.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *op) for op in ops)


def _argument(i: int) -> int:
    """Where the low half of an argument stands in struct seccomp_data, on a little-endian machine."""
    return 16 + 8 * i


def install(alone: int | None) -> int:
    """Puts this process, and what it starts, behind the filter for good. Returns the listener's descriptor."""
    machine = os.uname().machine
    filter_ = build(machine, alone)

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    program = Program(len(filter_) // 8, filter_)
    return linux.syscall("seccomp", MACHINES[machine][1], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))


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
    return _names().get(number, f"system call {number}")


@functools.cache
def _names() -> dict[int, str]:
    _, _, refused, judged, extra = MACHINES[os.uname().machine]
    return {number: name for name, number in (refused | judged | extra).items()}

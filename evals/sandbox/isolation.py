"""Linux namespaces: those that a worker enters once, and those in them that each program gets anew.

Inside there is a file system of the interpreter's libraries (read-only), five devices and an empty scratch folder; a
network without interfaces; one unprivileged user. There is no /proc, no shell and no program at all. Each program has
a process namespace (it sees nobody else's) and a scratch folder in memory, and both end with it.

Works for any user where the kernel (5.14 or newer) allows user namespaces. Root maps programs to `nobody`, so that what
only root may read stays unread and the limit on processes, which does not hold for root, holds.
"""

import os
import re
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from evals.sandbox import linux

SCRATCH = "/scratch"
SCRATCH_MB, SCRATCH_FILES = 64, 4096
UID = 1000  # of programs, as they see it
_NOBODY = 65534  # of programs, as the machine sees it where root starts them
_KERNEL = (5, 14)  # the first that counts processes for each user namespace; mount_setattr is of 5.12
_DEVICES = ("null", "zero", "full", "random", "urandom")
_OLD = "/old"


class Layers(NamedTuple):
    """Which of the kernel's means isolate a program."""

    namespaces: bool
    seccomp: bool


def enter() -> int:
    """Moves this single-threaded process into namespaces of its own. Returns a descriptor of the machine's /proc.
    OSError where the kernel does not let it; the process is of no use then."""
    if sys.platform != "linux":
        raise OSError("only Linux has them")
    release = os.uname().release
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < _KERNEL:
        raise OSError(f"Linux {release} is older than {'.'.join(map(str, _KERNEL))}")
    visible = _visible()
    _unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    socket.sethostname("sandbox")
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=1m")
    os.mkdir("/tmp" + _OLD)
    linux.call("pivot_root", b"/tmp", b"/tmp" + _OLD.encode())
    os.chdir("/")
    proc = os.open(_OLD + "/proc", os.O_RDONLY | os.O_DIRECTORY)
    _make_root(visible)
    linux.call("umount2", _OLD.encode(), linux.MNT_DETACH)
    os.rmdir(_OLD)
    linux.restrict_mount("/", linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID, recursive=False)
    if os.geteuid() == 0:
        os.setgroups([])
        linux.switch_user(UID, UID)
    return proc


def mount_scratch() -> None:
    """An empty scratch folder, in memory, that ends with the namespace of the process that mounts it."""
    size = f"size={SCRATCH_MB}m,nr_inodes={SCRATCH_FILES},mode=700,uid={UID},gid={UID}"
    linux.mount("tmpfs", SCRATCH, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, size)


def _unshare(flags: int) -> None:
    """unshare() with CLONE_NEWUSER, while a process outside says which users there are inside. Root may map several:
    itself, which mounts and can read where it is installed, and nobody. Others can map themselves alone."""
    if os.geteuid() == 0:
        ids = f"0 0 1\n{UID} {_NOBODY} 1\n"
        maps = {"uid_map": ids, "gid_map": ids}
    else:
        maps = {"setgroups": "deny", "uid_map": f"{UID} {os.geteuid()} 1\n", "gid_map": f"{UID} {os.getegid()} 1\n"}
    process, (wait, go) = Path(f"/proc/{os.getpid()}"), os.pipe()

    def write_maps() -> None:
        os.close(go)
        if os.read(wait, 1):
            for name, text in maps.items():
                (process / name).write_text(text)

    join = linux.run_in_child("uid_map", write_maps)
    try:
        linux.call("unshare", flags)
        os.write(go, b"1")
    finally:
        os.close(go)
        os.close(wait)
        join()


def _visible() -> dict[str, str]:
    """{path inside: real path} of what programs can read: Python's own folders and those of shared libraries."""
    wanted = [os.path.join(p, "lib") for p in (sys.base_prefix, sys.base_exec_prefix)]
    wanted += [p for p in sys.path if os.path.isabs(p)]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return {os.path.normpath(p): os.path.realpath(p) for p in wanted if os.path.exists(p)}


def _make_root(visible: dict[str, str]) -> None:
    """Makes the new root's files, while the old root is still there below _OLD."""
    mounted: list[str] = []
    for path in sorted(visible):
        if any(Path(path).is_relative_to(folder) for folder in mounted):
            continue
        mounted.append(path)
        if os.path.dirname(path) == "/" and os.path.islink(_OLD + path):  # /lib -> usr/lib
            os.symlink(os.readlink(_OLD + path), path)
        else:
            _bind(_OLD + visible[path], path)
            attributes = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
            linux.restrict_mount(path, attributes, recursive=True)
    for name in _DEVICES:
        _bind(f"{_OLD}/dev/{name}", f"/dev/{name}")
    os.mkdir(SCRATCH)
    os.symlink(SCRATCH, "/dev/shm")  # where the C library keeps multiprocessing's semaphores


def _bind(source: str, target: str) -> None:
    os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), exist_ok=True)
    if not os.path.isdir(source):
        open(target, "x").close()
    linux.mount(source, target, "", linux.MS_BIND | linux.MS_REC)

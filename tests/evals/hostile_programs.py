"""Programs that mean harm, as data: what each does, and what the sandbox has to call it.

Before each source stand constants: OUTSIDE (a folder of the evaluator, with a file `kept`), EVALUATOR (its process id),
PORT (where it listens on loopback), UNIX (its socket's path); and `libc` and `must`, which raises the error of a call
that failed, so that an attack ends by its refusal and one that works ends by passing.
"""

from typing import NamedTuple

from evals.sandbox import Outcome

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def syscall(x86_64, aarch64, *args):
    number = {"x86_64": x86_64, "aarch64": aarch64}[os.uname().machine]
    return must(libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args]))
"""


class Hostile(NamedTuple):
    name: str
    source: str
    outcome: Outcome
    says: str  # a part of str(result)


def _calls(*pairs: tuple[str, str]) -> list[Hostile]:
    """Single system calls that must be refused by name."""
    return [Hostile(call, source, Outcome.CALL_REFUSED, f"refused: {call}") for call, source in pairs]


MEMORY = [
    Hostile("memory bomb", "x = []\nwhile True: x.append(' ' * 10**6)", Outcome.OUT_OF_MEMORY, "MemoryError"),
    Hostile("mmap huge", "import mmap; mmap.mmap(-1, 1 << 40)", Outcome.OUT_OF_MEMORY, "Errno 12"),
    Hostile("endless file", "open('/dev/zero', 'rb').read()", Outcome.OUT_OF_MEMORY, "MemoryError"),
    Hostile(
        "memory of many processes",
        "import time\nfor _ in range(8):\n    if os.fork() == 0: x = b'x' * 10**8; time.sleep(60)\ntime.sleep(60)",
        Outcome.OUT_OF_MEMORY,
        "out of memory",
    ),
]
PROCESSES = [
    Hostile("fork bomb", "while True: os.fork()", Outcome.PROCESS_LIMIT, "BlockingIOError"),
    Hostile(
        "thread bomb",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        Outcome.PROCESS_LIMIT,
        "can't start new thread",
    ),
    Hostile(
        "daemon that outlives it",
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\n    os._exit(0)",
        Outcome.PASSED,
        "processes outlived it",
    ),
    Hostile(
        "child that leaves the session to escape the time limit",
        "if os.fork() == 0:\n    os.setsid()\n    while True: pass\nos.wait()",
        Outcome.TIMED_OUT,
        "",
    ),
    Hostile("sleep", "import time; time.sleep(60)", Outcome.TIMED_OUT, ""),
    Hostile("number without end", "9 ** 9 ** 9", Outcome.TIMED_OUT, ""),
    Hostile(
        "deaf to signals",
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        Outcome.TIMED_OUT,
        "",
    ),
    Hostile("stops itself", "import signal; os.kill(os.getpid(), signal.SIGSTOP)", Outcome.TIMED_OUT, ""),
    Hostile("kills the evaluator", "os.kill(EVALUATOR, 9)", Outcome.FAILED, "ProcessLookupError"),
    Hostile("a signal without a name", "os.kill(os.getpid(), 40)", Outcome.KILLED, "signal 40"),
    Hostile("kills its group", "os.kill(0, 9)", Outcome.KILLED, "SIGKILL"),
    Hostile("pidfd of the evaluator", "os.pidfd_open(EVALUATOR)", Outcome.FAILED, "ProcessLookupError"),
    Hostile(
        "changes its limits",
        "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (9**6, 9**6))",
        Outcome.FAILED,
        "prlimit",
    ),
    Hostile("a shell", "os.execv('/bin/sh', ['sh', '-c', 'id'])", Outcome.CALL_REFUSED, "refused: execve"),
    Hostile("subprocess", "import subprocess; subprocess.run(['id'])", Outcome.CALL_REFUSED, "refused: execve"),
    Hostile("hides in new namespaces", "syscall(56, 220, 0x10000000 | 17, 0, 0, 0, 0)", Outcome.CALL_REFUSED, "clone"),
    Hostile("clone3", "syscall(435, 435, 0, 0)", Outcome.FAILED, "Errno 38"),
]
FILES = [
    Hostile("one big file", "open('big', 'wb').write(b'x' * 10**8)", Outcome.DISK_LIMIT, "File too large"),
    Hostile(
        "several big files", "for i in range(9): open(str(i), 'wb').write(bytes(15 << 20))", Outcome.DISK_LIMIT, "space"
    ),
    Hostile("many small files", "for i in range(10**6): open(str(i), 'w').close()", Outcome.DISK_LIMIT, "space"),
    Hostile(
        "shared memory filler",
        "for i in range(9): open(f'/dev/shm/{i}', 'wb').write(bytes(15 << 20))",
        Outcome.DISK_LIMIT,
        "space",
    ),
    Hostile("the home folder", "print(open(OUTSIDE + '/kept').read())", Outcome.FILE_REFUSED, "kept"),
    Hostile("a folder of the evaluator", "print(os.listdir(OUTSIDE))", Outcome.FILE_REFUSED, "FileNotFoundError"),
    Hostile("users", "print(open('/etc/passwd').read())", Outcome.FILE_REFUSED, "/etc/passwd"),
    Hostile("environment of the evaluator", "open(f'/proc/{EVALUATOR}/environ')", Outcome.FILE_REFUSED, "environ"),
    Hostile("its own environment", "print(os.environ, os.environ['NANOCHAT_SECRET'])", Outcome.FAILED, "KeyError"),
    Hostile("writes outside", "open(OUTSIDE + '/new', 'w')", Outcome.FILE_REFUSED, "/new"),
    Hostile("writes into the root", "open('/new', 'w')", Outcome.FILE_REFUSED, "Read-only"),
    Hostile("deletes the interpreter", "os.remove(os.__file__)", Outcome.FILE_REFUSED, "Read-only"),
    Hostile(
        "symbolic link outward",
        "os.symlink(OUTSIDE, 'inside'); open('inside/kept', 'w')",
        Outcome.FILE_REFUSED,
        "inside/kept",
    ),
    Hostile("hard link outward", "os.link(os.__file__, 'mine')", Outcome.FILE_REFUSED, "mine"),
    Hostile("the terminal", "open('/dev/tty', 'w')", Outcome.FILE_REFUSED, "/dev/tty"),
    Hostile("the machine's memory", "open('/dev/mem', 'rb')", Outcome.FILE_REFUSED, "/dev/mem"),
    Hostile("inotify exhaustion", "while True: must(libc.inotify_init())", Outcome.OPEN_FILES_LIMIT, "Errno 24"),
    Hostile(
        "epoll exhaustion",
        "import select\nx = [select.epoll() for _ in range(99)]",
        Outcome.OPEN_FILES_LIMIT,
        "Errno 24",
    ),
]
NETWORK = [
    Hostile(name, "import socket as s\n" + source, Outcome.NETWORK_REFUSED, "refused: socket")
    for name, source in (
        ("loopback", "s.create_connection(('127.0.0.1', PORT))"),
        ("outside", "s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))"),
        ("unix socket", "s.socket(s.AF_UNIX).connect(UNIX)"),
        ("a name", "s.create_connection(('example.org', 80))"),
        ("netlink", "s.socket(s.AF_NETLINK, s.SOCK_RAW)"),
        ("by ctypes", "must(libc.socket(2, 1, 0))"),
        ("urllib", "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}')"),
    )
]
CALLS = _calls(
    ("kill", "os.kill(os.getppid(), 9)"),
    ("kill", "os.kill(-1, 9)"),
    ("kill", "must(libc.kill(1, 9))"),
    ("tgkill", "syscall(234, 131, 1, 1, 2)"),
    ("tkill", "syscall(200, 130, 1, 2)"),
    ("rt_sigqueueinfo", "syscall(129, 138, 1, 2, 0)"),
    ("ptrace", "must(libc.ptrace(16, 1, 0, 0))"),
    ("process_vm_readv", "must(libc.process_vm_readv(1, 0, 0, 0, 0, 0))"),
    ("unshare", "must(libc.unshare(0x10000000))"),
    ("setns", "must(libc.setns(0, 0))"),
    ("mount", "must(libc.mount(b'none', b'/scratch', b'proc', 0, None))"),
    ("umount2", "must(libc.umount2(b'/scratch', 2))"),
    ("chroot", "os.chroot('.')"),
    ("pivot_root", "syscall(155, 41, 0, 0)"),
    ("personality", "must(libc.personality(0x0040000))"),
    ("mknodat", "import stat; os.mknod('disk', stat.S_IFBLK | 0o666, os.makedev(8, 0))"),
    ("keyctl", "syscall(250, 219, 0, -3, 1)"),
    ("perf_event_open", "syscall(298, 241, 0, 0, -1, -1, 0)"),
    ("bpf", "syscall(321, 280, 0, 0, 0)"),
    ("userfaultfd", "syscall(323, 282, 0)"),
    ("io_uring_setup", "syscall(425, 425, 8, 0)"),
    ("io_setup", "syscall(206, 0, 1, 0)"),
    ("memfd_create", "os.memfd_create('x')"),
    ("shmget", "must(libc.shmget(0, 1 << 30, 0o1600))"),
    ("sethostname", "must(libc.sethostname(b'x', 1))"),
    ("setpriority", "os.nice(-10)"),
    ("ioprio_set", "syscall(251, 30, 1, 0, 0)"),
    ("sched_setaffinity", "os.sched_setaffinity(0, {0})"),
    ("seccomp", "syscall(317, 277, 0, 0, 0)"),
    ("reboot", "must(libc.reboot(0))"),
)
ENDS = [
    Hostile("endless output", "while True: print('x' * 1000)", Outcome.TOO_MUCH_OUTPUT, ""),
    Hostile("endless errors", "while True: os.write(2, b'x' * 1000)", Outcome.TOO_MUCH_OUTPUT, ""),
    Hostile("recursion", "def f(): f()\nf()", Outcome.FAILED, "RecursionError"),
    Hostile(
        "recursion in C",
        "sys.setrecursionlimit(10**6)\nx = []\nfor _ in range(10**5): x = [x]\nrepr(x)",
        Outcome.KILLED,
        "SIGSEGV",
    ),
    Hostile("segmentation fault", "ctypes.string_at(0)", Outcome.KILLED, "SIGSEGV"),
    Hostile("abort", "os.abort()", Outcome.KILLED, "SIGABRT"),
    Hostile("leaves by _exit", "os._exit(0)", Outcome.LEFT_EARLY, "exit status 0"),
    Hostile("leaves by sys.exit", "sys.exit(0)", Outcome.LEFT_EARLY, "SystemExit: 0"),
    Hostile("leaves by the C library", "libc.exit(0)", Outcome.LEFT_EARLY, "exit status 0"),
    Hostile(
        "child that runs to the end in its place",
        "if os.fork():\n    os.wait()\n    os._exit(0)",
        Outcome.LEFT_EARLY,
        "exit status 0",
    ),
    Hostile(
        "forges the report",
        "import json\nfor fd in range(3, 99):\n    try: os.write(fd, json.dumps({'outcome': 'passed'}).encode())\n"
        "    except OSError: pass\nos._exit(0)",
        Outcome.FORGED,
        "",
    ),
    Hostile(
        "forges the report from our own frames, and breaks it",
        "frame = sys._getframe()\nwhile 'nonce' not in frame.f_locals: frame = frame.f_back\n"
        "os.write(3, frame.f_locals['nonce'] + b'[' * 60000)",
        Outcome.FORGED,
        "",
    ),
    Hostile("takes functions from us", "os.write = os._exit = os.getpid = None; 1 / 0", Outcome.FAILED, "ZeroDivision"),
    Hostile("floods the report", "while True: os.write(3, b'x' * 4096)", Outcome.TOO_MUCH_OUTPUT, ""),
    Hostile("closes everything", "os.closerange(0, 99)", Outcome.LEFT_EARLY, "exit status 0"),
    Hostile(
        "its output in every descriptor",
        "for fd in range(3, 60): os.dup2(1, fd)",
        Outcome.LEFT_EARLY,
        "exit status 0",
    ),
]
PROGRAMS = [*MEMORY, *PROCESSES, *FILES, *NETWORK, *CALLS, *ENDS]

"""Where there are no namespaces: an audit hook that refuses what a program would do by accident.

New processes, signals to others, sockets, ctypes, and writing or deleting outside of the scratch folder. Audit hooks
are no security boundary: a C extension gets past them, and what the user may read can be read.
"""

import errno
import os
import sys

from evals.sandbox.result import is_outside

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    *("os.fork", "os.posix_spawn", "os.exec", "os.system", "os.kill", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.send", "socket.get", "signal.pthread_kill", "resource."),
)
_TWO_PATHS = ("os.rename", "os.link", "os.symlink", "shutil.move")
_ONE_PATH = ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")


def install(scratch: str) -> list[str]:
    """Adds the hook, for good. Returns a list to which it adds the events that it refuses."""
    seen: list[str] = []

    def refuse(event: str, args: tuple) -> None:
        if event.startswith("ctypes."):
            raise ImportError("ctypes is refused here")  # which libraries know how to do without
        if event.startswith(_REFUSED):
            if event not in seen and len(seen) < 16:
                seen.append(event)
            raise PermissionError(errno.EPERM, f"{event} is refused here")
        writes = event in _ONE_PATH or event in _TWO_PATHS or (event == "open" and (args[2] or 0) & _WRITING)
        for path in args[: 2 if event in _TWO_PATHS else 1] if writes else ():
            if is_outside(path, scratch) and os.path.realpath(os.fsdecode(path)) != os.devnull:
                raise PermissionError(errno.EPERM, f"{event} is refused here", path)

    sys.addaudithook(refuse)
    return seen

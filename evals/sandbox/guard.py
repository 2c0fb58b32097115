"""Where there are no walls: an audit hook that refuses what a program would do by accident.

New processes, signals to others, sockets, ctypes, and writing or deleting outside of the scratch folder. Audit hooks
are no security boundary: a C extension gets past them, and what the user may read can be read.
"""

from __future__ import annotations

import errno
import os
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    *("os.fork", "os.posix_spawn", "os.exec", "os.system", "os.kill", "subprocess.Popen", "pty.spawn", "ctypes."),
    *("socket.connect", "socket.bind", "socket.send", "socket.get", "signal.pthread_kill", "resource."),
)
_TWO_PATHS = ("os.rename", "os.link", "os.symlink", "shutil.move")
_ONE_PATH = ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")


def put_up(scratch: str) -> list[str]:
    """Adds the hook, for good. Returns a list to which it adds the events that it refuses."""
    seen: list[str] = []

    def inside(path) -> bool:
        if isinstance(path, int):
            return True  # a descriptor was judged when it was opened
        path = os.path.realpath(os.fsdecode(path))
        return path == scratch or path.startswith(scratch + os.sep) or path == os.devnull

    def guard(event: str, args: tuple) -> None:
        path = None
        if event == "open":
            if not (args[2] or 0) & _WRITING or inside(args[0]):
                return
            path = args[0]
        elif event.startswith(_REFUSED):
            if event.startswith("ctypes."):
                raise ImportError("ctypes is refused here")  # which libraries know how to do without
            if event not in seen and len(seen) < 16:
                seen.append(event)
        elif event in _TWO_PATHS or event in _ONE_PATH:
            outside = [p for p in args[: 2 if event in _TWO_PATHS else 1] if not inside(p)]
            if not outside:
                return
            path = outside[0]
        else:
            return
        raise PermissionError(errno.EPERM, f"{event} is refused here", path)

    sys.addaudithook(guard)
    return seen

"""Files that are either whole or absent, and folders that one process at a time may write to."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nanochat_jax.errors import UserError
from nanochat_jax.processes import cores


def part_of(path: Path) -> Path:
    """Where this process writes what will be `path`: beside it, and apart from other processes, on other hosts too."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def atomic_write_text(path: str | Path, text: str) -> None:
    """`text` as UTF-8, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Writes beside the target, flushes to the disk and renames: a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # where the write failed


def atomic_write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all. TypeError where JSON cannot say it; the file is then as it was."""
    atomic_write_text(path, json.dumps(value, indent=1) + "\n")


def check_writable(folder: Path) -> None:
    """Makes a folder. OSError where no file can be made there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end of the block, and not at all where that fails. UserError where
    there is something already."""
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"there is something at {path} already; take another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: str | Path, kind: type = dict) -> Any | None:
    """The file's value, or None where there is no such file. UserError where it is no JSON of that kind."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, kind):
            return value
        what = f"it holds a {type(value).__name__} where a {kind.__name__} should be"
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as e:  # not JSON, or not even text
        what = str(e)
    raise UserError(f"{path} is damaged ({what}); mend it, or rename it to go on without")


def digest_of(paths: Iterable[Path]) -> str:
    """One hash of the contents of small files."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


RECENT = 2_000_000_000  # ns: a file as young as that may change again without a change of its times


def content_hashes(paths: Sequence[Path], memory: Path) -> list[str]:
    """A hash of the contents of each file. Those that did not change since are not read again: `memory`, a JSON file,
    knows their size and times, where it may be written. UserError where a file cannot be read."""
    known = read_json(memory) or {}

    def hashed(path: Path) -> list:
        """Size, times and hash."""
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
                held = known.get(str(path.absolute()), [None])
                return held if held[:-1] == state else [*state, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror})") from None

    with ThreadPoolExecutor(cores()) as pool:  # hashing lets other threads run
        found = list(pool.map(hashed, paths))
    settled = {str(p.absolute()): f for p, f in zip(paths, found) if time.time_ns() - max(f[1:3]) > RECENT}
    if not settled.items() <= known.items():
        with suppress(OSError):  # who may only read the cache hashes again
            atomic_write_json(memory, known | settled)
    return [digest for *_, digest in found]


def claim(path: str | Path) -> TextIO:
    """Claims `path` for this process until it ends or closes the returned file; UserError where another one holds it.

    A POSIX record lock: it goes when its process dies, however it dies, and forked children do not inherit it. File
    systems without locks grant it always.
    """
    import fcntl

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held by the caller)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"another process is writing to {path.parent}; wait until it ends, or take another directory"
        ) from None
    except OSError:
        pass  # ENOLCK, ENOSYS: the file system has no locks
    return file

"""Datasets of the Hugging Face hub: files that resume and are checked, tables through `datasets`.

A download goes to `<name>.part` and is taken up there after a break; its size and, where the hub states one, its
SHA-256 are checked before it gets its name. What was downloaded once is not asked for again: the hub may be away. A
file whose size or time of change is not as noted is read, and fetched again where its SHA-256 is not as noted either.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json

TRIES = 5
BLOCK = 8 << 20  # bytes read at a time
OFFLINE = (
    "without a network, run `python -m nanochat_jax.data download` where there is one and copy runs/cache/hub"
    " here, set data.dir to a folder that has the data, or leave data.source out for the embedded data"
)
ELSEWHERE = "make room, or name another folder by data.cache_dir (--to of the download command)"
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


def hub_filesystem():
    """The hub's datasets as an fsspec file system; paths are datasets/<owner>/<name>/<file>."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


class Stopped(Exception):
    """Raised by the one who watches a download, to end it; what came stays in the part file."""


def fetch(
    source: str,
    target: Path,
    fs=None,
    *,
    size: int | None = None,
    sha256: str | None = None,
    on_block: Callable[[int], None] | None = None,
    **words: str,
) -> Path:
    """`target`, downloaded from the path `source` unless it is there and whole. UserError where that fails.

    size, sha256: what it must have, where the caller knows; else what the hub says now. on_block(bytes) is called for
    every block that comes, and while another process downloads; what it raises ends the download. words: those of
    `asking`.
    """
    watch = on_block or (lambda n: None)
    note = target.with_name(target.name + ".json")
    try:
        if is_whole(target, size, sha256, trust_time=True):  # then nothing is written: the cache may be read-only
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(f".{target.name}.lock"), watch):
            digest = (read_json(note) or {}).get("sha256") or sha256
            if not is_whole(target, size, sha256):
                digest = _download(source, target, fs or hub_filesystem(), size, sha256, watch, words)
            found = target.stat()
            now = {"size": found.st_size, "sha256": digest, "mtime_ns": found.st_mtime_ns}
            if now != read_json(note):
                atomic_write_json(note, now)
    except OSError as e:
        if e.errno not in (errno.EROFS, errno.EACCES) or not is_whole(target, size, sha256):
            raise UserError(f"cannot write to {target.parent} ({e.strerror or e}); {ELSEWHERE}") from None
    return target


def is_whole(target: Path, size: int | None = None, sha256: str | None = None, trust_time: bool = False) -> bool:
    """Whether a file is as it was noted, or as the list of files says. Reads it where its time of change is not the
    noted one, or says no with `trust_time`."""
    known = read_json(target.with_name(target.name + ".json")) or {"size": size, "sha256": sha256}
    if not known["sha256"] or (sha256 and sha256 != known["sha256"]) or not target.is_file():
        return False
    found = target.stat()
    if known["size"] is not None and found.st_size != known["size"]:
        return False
    return found.st_mtime_ns == known.get("mtime_ns") or (not trust_time and _sha256(target) == known["sha256"])


@contextlib.contextmanager
def _alone(path: Path, watch: Callable[[int], None]) -> Iterator[None]:
    """Waits until no other process or thread is inside for this path: two would append to one part file."""
    import fcntl

    with open(path, "a") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                watch(0)
                time.sleep(0.1)
            except OSError:  # file systems without locks
                break
            else:
                break
        yield


def _download(source: str, target: Path, fs, size, sha256: str | None, watch: Callable, words: dict) -> str:
    """Downloads, checks, and gives the file its name. Its SHA-256."""
    part = target.with_name(target.name + ".part")
    if size is None:
        info = asking(source, lambda: fs.info(source), **words)
        size, sha256 = info["size"], sha256 or (info.get("lfs") or {}).get("sha256")

    def attempt() -> str:
        _append(fs, source, part, size, watch)
        digest, got = _sha256(part), part.stat().st_size
        if got < size:
            raise OSError(f"it ended at byte {got} of {size}")  # the next attempt goes on from there
        if got != size or (sha256 and digest != sha256):
            part.unlink()
            raise OSError("what came is not what the hub has, or had when it was listed")
        return digest

    digest = asking(source, attempt, **words)
    os.replace(part, target)
    return digest


def _append(fs, source: str, part: Path, size: int, watch: Callable[[int], None]) -> None:
    """Downloads what `part` lacks."""
    have = part.stat().st_size if part.is_file() else 0
    if have > size:
        part.unlink()
        have = 0
    watch(0)
    with fs.open(source, "rb", size=size) as remote, open(part, "ab") as local:
        remote.seek(have)
        while block := remote.read(BLOCK):
            local.write(block)
            watch(len(block))
        local.flush()
        os.fsync(local.fileno())  # a power cut must not leave a whole name with half its bytes


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def asking(what: str, ask: Callable, pause: float = 1.0, server: str = "the hub", advice: str = OFFLINE):
    """ask(), tried again with growing pauses where that may help. UserError where it fails for good: what `server` has
    not got or will not give, and what to do then."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for attempt in range(TRIES):
        try:
            return ask()
        except Stopped:
            raise
        except FileNotFoundError:
            raise UserError(f"{server} has no {what}; {advice}") from None
        except Exception as e:
            reason = (str(e).splitlines() or [""])[0][:120]
            if getattr(e, "errno", None) in LOCAL_ERRORS:
                raise UserError(f"cannot keep {what} ({e.strerror}); {ELSEWHERE}") from None
            status = getattr(getattr(e, "response", None), "status_code", None)
            hopeless = isinstance(e, OfflineModeIsEnabled) or status in (401, 403, 404)
            if hopeless or attempt == TRIES - 1:
                raise UserError(f"cannot get {what} ({type(e).__name__}: {reason}); {advice}") from None
            time.sleep(pause * 2**attempt)


def task_table(repo: str, config: str | None, split: str, cache_dir: Path):
    """The rows of a dataset's split, by index; `repo` may be a folder of the same layout. UserError.

    What is in the cache is taken from there without a word to the hub, which `datasets` would ask first, and without a
    network only after half a minute of trying.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    logging.getLogger(Cache.__module__).setLevel(logging.ERROR)  # it warns that it does what it is asked to
    known = {"repo_id": repo, "dataset_name": repo.split("/")[-1], "config_name": config}
    with contextlib.suppress(Exception):  # it is not there, or damaged
        return Cache(cache_dir=str(cache_dir), version="auto", hash="auto", **known).as_dataset(split)
    try:
        return datasets.load_dataset(repo, config, split=split, cache_dir=str(cache_dir))
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0][:160]
        raise UserError(
            f"cannot load {repo} {config or ''} {split} ({type(e).__name__}: {reason}); {OFFLINE}"
        ) from None

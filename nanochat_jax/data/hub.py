"""Datasets of the Hugging Face hub: shards that resume and are checked, tables through `datasets`.

A download goes to `<name>.part` and is taken up there after a break; its size and, where the hub states one, its
SHA-256 are checked before it gets its name. What was downloaded once is not asked for again: the hub may be away. A
file whose size or time of change is not as noted is read, and fetched again where its SHA-256 is not as noted either.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json

TRIES = 5
BLOCK = 8 << 20  # bytes read at a time
OFFLINE = "set data.dir to a folder that has the data, or leave data.source out for the embedded data"


def hub_filesystem():
    """The hub's datasets as an fsspec file system; paths are datasets/<owner>/<name>/<file>."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def pretrain_files(repo: str, n_shards: int, cache_dir: Path, fs=None) -> tuple[list[Path], Path]:
    """(the first n_shards training shards, the validation shard), downloaded.

    The last shard by name of the whole dataset is validation, however many are asked for. UserError where there are
    not so many, or the hub cannot be reached and they are not in the cache.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"data.hub_pretrain={repo} is no name of a dataset, which read owner/name")
    folder = Path(cache_dir) / repo.replace("/", "--")
    names = _shard_names(repo, folder, fs)
    if n_shards < 1:
        raise UserError(f"data.hub_shards={n_shards}: it takes at least one training shard")
    if len(names) < n_shards + 1:
        raise UserError(f"{repo} has {len(names) - 1} training shards; data.hub_shards={n_shards} asks for more")
    paths = [fetch(f"datasets/{repo}/{name}", folder / name, fs) for name in [*names[:n_shards], names[-1]]]
    return paths[:-1], paths[-1]


def _shard_names(repo: str, folder: Path, fs) -> list[str]:
    """The dataset's parquet files, sorted; kept in the cache, so that a later run needs no network for it."""
    listing = folder / "shards.json"
    names = read_json(listing)
    if names is None:
        root = f"datasets/{repo}/"
        found = _asking(repo, lambda: (fs or hub_filesystem()).glob(root + "**/*.parquet"))
        names = sorted(path.split(root, 1)[1] for path in found)
        if len(names) < 2:
            raise UserError(f"{repo} holds {len(names)} parquet shards; set data.hub_pretrain to a dataset of several")
        atomic_write_json(listing, names)
    return names


def fetch(source: str, target: Path, fs=None) -> Path:
    """`target`, downloaded from the path `source` unless it is there and whole. UserError where that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(f".{target.name}.lock")):
        note = target.with_name(target.name + ".json")
        known = read_json(note) or {}
        if not _intact(target, known):
            known = {"size": None, "sha256": _download(source, target, fs or hub_filesystem())}
        found = target.stat()
        now = {"size": found.st_size, "sha256": known["sha256"], "mtime_ns": found.st_mtime_ns}
        if now != known:
            atomic_write_json(note, now)
    return target


def _intact(target: Path, known: dict) -> bool:
    """Whether a file is as it was noted. Reads it only where its time of change is another."""
    if not known or not target.is_file() or target.stat().st_size != known["size"]:
        return False
    return target.stat().st_mtime_ns == known.get("mtime_ns") or _sha256(target) == known["sha256"]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process or thread is inside for this path: two would append to one part file."""
    import fcntl

    with open(path, "a") as f:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _download(source: str, target: Path, fs) -> str:
    """Downloads, checks, and gives the file its name. Its SHA-256."""
    part = target.with_name(target.name + ".part")
    info = _asking(source, lambda: fs.info(source))
    stated = (info.get("lfs") or {}).get("sha256")

    def attempt() -> str:
        _append(fs, source, part, info["size"])
        digest = _sha256(part)
        size = part.stat().st_size
        if size < info["size"]:
            raise OSError(f"it ended at byte {size} of {info['size']}")  # the next attempt goes on from there
        if size != info["size"] or (stated and digest != stated):
            part.unlink()
            raise OSError("what came is not what the hub has")
        return digest

    digest = _asking(source, attempt)
    os.replace(part, target)
    return digest


def _append(fs, source: str, part: Path, size: int) -> None:
    """Downloads what `part` lacks."""
    have = part.stat().st_size if part.is_file() else 0
    if have > size:
        part.unlink()
        have = 0
    with fs.open(source, "rb") as remote, open(part, "ab") as local:
        remote.seek(have)
        while block := remote.read(BLOCK):
            local.write(block)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _asking(what: str, ask: Callable, pause: float = 1.0):
    """ask(), tried again with growing pauses where that may help. UserError where it fails for good."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for attempt in range(TRIES):
        try:
            return ask()
        except FileNotFoundError:
            raise UserError(f"the hub has no {what}; {OFFLINE}") from None
        except Exception as e:
            status = getattr(getattr(e, "response", None), "status_code", None)
            hopeless = isinstance(e, OfflineModeIsEnabled) or status in (401, 403, 404)
            hopeless = hopeless or getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
            if hopeless or attempt == TRIES - 1:
                reason = (str(e).splitlines() or [""])[0][:120]
                raise UserError(f"cannot get {what} ({type(e).__name__}: {reason}); {OFFLINE}") from None
            time.sleep(pause * 2**attempt)


def task_table(repo: str, config: str | None, split: str, cache_dir: Path):
    """The rows of a dataset's split, by index; `repo` may be a folder of the same layout. UserError."""
    import datasets

    try:
        return datasets.load_dataset(repo, config, split=split, cache_dir=str(cache_dir))
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0][:160]
        raise UserError(
            f"cannot load {repo} {config or ''} {split} ({type(e).__name__}: {reason}); {OFFLINE}"
        ) from None

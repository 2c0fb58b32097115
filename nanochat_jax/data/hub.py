"""Datasets of the Hugging Face hub: shards that resume and are checked, tables through `datasets`.

A download goes to `<name>.part` and is taken up there after a break; its size and, where the hub states one, its
SHA-256 are checked before it gets its name. What was downloaded once is not asked for again: the hub may be away.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
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
    folder = Path(cache_dir) / repo.replace("/", "--")
    names = _shard_names(repo, folder, fs)
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
    """`target`, downloaded from the path `source` where it is not there yet. UserError where that fails."""
    note = target.with_name(target.name + ".json")
    known = read_json(note)
    if known and target.is_file() and target.stat().st_size == known["size"]:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    fs = fs or hub_filesystem()
    info = _asking(source, lambda: fs.info(source))
    stated = (info.get("lfs") or {}).get("sha256")

    def attempt() -> str:
        _append(fs, source, part, info["size"])
        digest = _sha256(part)
        if part.stat().st_size != info["size"] or (stated and digest != stated):
            part.unlink()
            raise OSError("what came is not what the hub has")
        return digest

    digest = _asking(source, attempt)
    os.replace(part, target)
    atomic_write_json(note, {"size": info["size"], "sha256": digest})
    return target


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
    """ask(), tried again with growing pauses. UserError where it fails for good."""
    for attempt in range(TRIES):
        try:
            return ask()
        except FileNotFoundError:
            raise UserError(f"the hub has no {what}; {OFFLINE}") from None
        except Exception as e:
            if attempt == TRIES - 1:
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

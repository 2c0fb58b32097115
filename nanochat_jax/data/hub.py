"""Downloads that resume and are checked, and tables through `datasets`.

The requests are huggingface_hub's, with its mirrors, tokens, offline mode and retries. Its `hf_hub_download` starts a
file again after a kill and compares only the size, so `fetch` writes to `<name>.part`, resumes that, and compares
size and SHA-256 before the file gets its name. A note beside the file, `<name>.json`, says what was found: then the
file is used without a request, and read again only where its time of change is another.
"""

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from filelock import FileLock

from nanochat_jax.data.cache import writing
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json

PAUSES = (1, 2)  # seconds before the second and the third try
OFFLINE = (
    "without a network, run `python -m nanochat_jax.data download` where there is one and copy runs/cache/hub"
    " here, set data.dir to a folder that has the data, or leave data.source out for the embedded data"
)
T = TypeVar("T")


class Stopped(Exception):
    """Raised by `on_block` of a download to end it; what came stays in the part file."""


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    on_block: Callable[[int], object] = lambda n: None,
    advice: str = OFFLINE,
) -> Path:
    """`target`, downloaded from `url` unless it is there and whole. UserError, ending in `advice`, where that fails.

    size, sha256: what the file must have, where that is known. on_block(bytes) is called for every block that comes,
    and while another process downloads the same file; what it raises ends the download.
    """
    with writing(target.parent):
        if not is_whole(target, size, sha256):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target, on_block):
                if not is_whole(target, size, sha256):
                    _download(url, target, size, sha256, on_block, advice)
    return target


def is_whole(target: Path, size: int | None, sha256: str | None) -> bool:
    """Whether a file is as noted, or without a note as the arguments say. Reads it where its time of change is new."""
    known = read_json(target.with_name(target.name + ".json")) or {"size": size, "sha256": sha256}
    if not known["sha256"] or (sha256 and sha256 != known["sha256"]) or not target.is_file():
        return False
    found = target.stat()
    if found.st_size != known["size"]:
        return False
    if found.st_mtime_ns == known.get("mtime_ns"):
        return True
    if _sha256(target) != known["sha256"]:
        return False
    with contextlib.suppress(OSError):  # the cache may be read-only
        _note(target, found, known["sha256"])
    return True


def part_of(target: Path) -> Path:
    """Where the bytes of an unfinished download are."""
    return target.with_name(target.name + ".part")


def _note(target: Path, found: os.stat_result, sha256: str) -> None:
    note = {"size": found.st_size, "sha256": sha256, "mtime_ns": found.st_mtime_ns}
    atomic_write_json(target.with_name(target.name + ".json"), note)


def _lock(target: Path, on_block: Callable[[int], object]) -> contextlib.AbstractContextManager:
    """Held by one thread of one process at a time: two would append to one part file."""
    try:
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        return lock.acquire(poll_interval=0.1, cancel_check=lambda: bool(on_block(0)))
    except (NotImplementedError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return contextlib.nullcontext()  # a file system without locks


def _download(
    url: str, target: Path, size: int | None, sha256: str | None, on_block: Callable[[int], object], advice: str
) -> None:
    """Downloads what the part file lacks, checks the file, and gives it its name and its note."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = part_of(target)
    progress = contextlib.nullcontext(SimpleNamespace(update=on_block))  # what the client takes for a tqdm bar
    headers = build_hf_headers(token=None if url.startswith(f"{constants.ENDPOINT}/") else False)
    headers["Accept-Encoding"] = "identity"  # compressed bytes cannot be resumed

    def attempt() -> str:
        if size is not None and part.is_file() and part.stat().st_size > size:
            part.unlink()
        on_block(0)
        with open(part, "ab") as f:
            http_get(
                url,
                f,
                resume_size=f.tell(),
                headers=headers,
                expected_size=size,
                tqdm_class=lambda **kwargs: progress,  # type: ignore[arg-type]  # it calls whatever it gets
            )
            f.flush()
            os.fsync(f.fileno())  # a power cut must not leave the whole name with half its bytes
        digest = _sha256(part)
        if sha256 and digest != sha256:
            part.unlink()
            raise ValueError("what came is not what the hub has, or had when it was listed")
        return digest

    digest = retrying(url, attempt, advice)
    _note(target, part.stat(), digest)  # first: who finds the file need not read it
    os.replace(part, target)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def retrying(url: str, ask: Callable[[], T], advice: str = OFFLINE) -> T:
    """ask(), retried with growing pauses where that may help. UserError where the server does not give `url`; OSError
    where the disk is what fails."""
    from huggingface_hub import errors

    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    pauses = iter(PAUSES)
    while True:
        try:
            return ask()
        except Stopped:
            raise
        except Exception as e:
            if isinstance(e, OSError) and e.errno is not None:  # of the disk: errors of the network have no number
                raise
            status = getattr(getattr(e, "response", None), "status_code", None)
            if (isinstance(e, absent) and not isinstance(e, errors.GatedRepoError)) or status in (404, 410):
                raise UserError(f"the server has no {url}; {advice}") from None
            pause = next(pauses, None)
            if pause is None or isinstance(e, errors.OfflineModeIsEnabled) or status in (401, 403):
                reason = (str(e).splitlines() or [""])[0][:120]
                raise UserError(f"cannot get {url} ({type(e).__name__}: {reason}); {advice}") from None
        time.sleep(pause)


def task_table(repo: str, config: str | None, split: str, cache_dir: Path):
    """The rows of a dataset's split, by index; `repo` may be a folder of the same layout. UserError.

    What is in the cache is taken from there first: `datasets` would ask the hub, and without a network only give up
    after half a minute.
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

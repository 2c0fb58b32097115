"""Datasets of the hub as documents: the files of each, which are training and which validation, fetched in their turn.

The list of a dataset's files is kept in the cache beside them. It is what they are compared with, so that a run and the
rows packed from it do not change where the dataset does: remove `listing.json` to have what is new.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_jax import formats
from nanochat_jax.data import hub
from nanochat_jax.data.documents import Documents, split_names
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json
from nanochat_jax.formats import Piece, kind_of, pieces_of

NAMED = {  # name -> (dataset, folder of it): what data.hub_pretrain takes beside owner/name
    "climbmix": ("karpathy/climbmix-400b-shuffle", None),
    "fineweb_edu": ("karpathy/fineweb-edu-100b-shuffle", None),
    "fineweb": ("HuggingFaceFW/fineweb", "sample/100BT"),
}
AHEAD = 4  # files fetched beside the walk over those before them
LISTING = "listing.json"


@dataclass(frozen=True)
class HubFile:
    name: str  # its path in the dataset
    size: int | None  # None, here and below: the hub did not say
    sha256: str | None


@dataclass(frozen=True)
class HubDocuments(Documents):
    """Files of a dataset, each fetched when it is its turn. `fs`: the hub, None for the real one."""

    repo: str
    train_files: tuple[HubFile, ...]
    val_file: HubFile
    folder: Path  # where they are kept
    column: str
    fs: object = None

    @property
    def key(self) -> list:
        files = [[f.name, f.size, f.sha256] for f in self.files()]
        return ["hub", formats.VERSION, self.repo, self.column, *files]

    def files(self) -> tuple[HubFile, ...]:
        return (*self.train_files, self.val_file)

    def path(self, file: HubFile) -> Path:
        return self.folder / file.name

    def fetch(self, file: HubFile, on_block: Callable[[int], None] | None = None) -> Path:
        source = f"datasets/{self.repo}/{file.name}"
        return hub.fetch(source, self.path(file), self.fs, size=file.size, sha256=file.sha256, on_block=on_block)

    def pieces(self, split: str) -> Iterator[Piece]:
        files = self.train_files if split == "train" else (self.val_file,)
        for path in _ahead(self.fetch, files):
            yield from pieces_of(path, self.column)


def hub_documents(
    name: str, subfolder: str | None, n_shards: int, cache_dir: Path, *, column: str = "text", fs=None
) -> HubDocuments:
    """The first n_shards training files of a dataset and its validation file (`split_names`); nothing is fetched but
    the list of files, where it is not in the cache.

    name: owner/name, or a key of NAMED. subfolder: take only what is below it. UserError where there are not so many,
    or the hub cannot be reached.
    """
    repo, usual = NAMED.get(name, (name, None))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        known = ", ".join(NAMED)
        raise UserError(f"{name!r} (data.hub_pretrain) is no name of a dataset, which read owner/name; or take {known}")
    subfolder = (subfolder or usual or "").strip("/")
    if ".." in subfolder.split("/"):
        raise UserError(f"{subfolder!r} (data.hub_folder) is no folder of a dataset")
    if n_shards < 1:
        raise UserError(f"data.hub_shards={n_shards} (-n): it takes at least one training file")
    folder = Path(cache_dir) / repo.replace("/", "--")
    files = {f.name: f for f in _listing(repo, subfolder, folder, fs)}
    train, val = split_names(list(files))
    if len(train) < n_shards:
        raise UserError(f"{repo} has {len(train)} training files; data.hub_shards={n_shards} (-n) asks for more")
    return HubDocuments(repo, tuple(files[n] for n in train[:n_shards]), files[val], folder, column, fs)


def _listing(repo: str, subfolder: str, folder: Path, fs) -> list[HubFile]:
    """The dataset's files of documents below a folder, by name, all of one kind: parquet where there is any, else JSON
    lines, else text. Kept in the cache, so that a later run needs no network for it."""
    path = folder / subfolder / LISTING
    try:
        known = read_json(path)
        if known is None:
            known = [asdict(f) for f in _ask(repo, subfolder, fs)]
            atomic_write_json(path, known)
    except OSError as e:
        raise UserError(f"cannot write to {path.parent} ({e.strerror or e}); {hub.ELSEWHERE}") from None
    return [HubFile(**f) for f in known]


def _ask(repo: str, subfolder: str, fs) -> list[HubFile]:
    root = f"datasets/{repo}/"
    below = root + subfolder + "/" if subfolder else root
    found = hub.asking(below.rstrip("/"), lambda: (fs or hub.hub_filesystem()).find(below.rstrip("/"), detail=True))
    kinds = {name: kind_of(name) for name in found}
    kind = next((k for k in ("parquet", "lines", "text") if any(v and v[0] == k for v in kinds.values())), None)
    if kind is None:
        raise UserError(
            f"{below} of the hub holds no .parquet, .jsonl or .txt files; see data.hub_pretrain, hub_folder"
        )
    return [
        HubFile(name.split(root, 1)[1], info.get("size"), (info.get("lfs") or {}).get("sha256"))
        for name, info in sorted(found.items())
        if kinds[name] and kinds[name][0] == kind
    ]


def _ahead(fetch: Callable, files: tuple[HubFile, ...]) -> Iterator[Path]:
    """The files in order, each once it is here, while the next ones are fetched. A failure is raised in its turn."""
    stop = threading.Event()

    def watch(n: int) -> None:
        if stop.is_set():
            raise hub.Stopped

    pool, pending = ThreadPoolExecutor(AHEAD), deque()
    try:
        for file in files:
            pending.append(pool.submit(fetch, file, on_block=watch))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the walk ends early
        stop.set()
        pool.shutdown(cancel_futures=True)

"""Datasets of the hub as documents, whose files are fetched when the walk over them reaches them.

The list of a dataset's files and its commit are kept in the cache beside them, in `listing.json`. So a run, and the
rows packed from it, do not change where the dataset does; remove that file to have what is new.
"""

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_jax import formats
from nanochat_jax.data import hub
from nanochat_jax.data.cache import writing
from nanochat_jax.data.documents import Documents, of_one_file, shared_out, split_names
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json
from nanochat_jax.formats import kind_of, texts_of

NAMED = {  # name -> (dataset, folder of it): what data.hub_pretrain takes beside owner/name
    "climbmix": ("karpathy/climbmix-400b-shuffle", None),
    "fineweb_edu": ("karpathy/fineweb-edu-100b-shuffle", None),
    "fineweb": ("HuggingFaceFW/fineweb", "sample/100BT"),
}
PREFETCH = 4  # files fetched while those before them are read
LISTING = "listing.json"


@dataclass(frozen=True)
class HubFile:
    name: str  # its path in the dataset
    size: int | None
    sha256: str | None  # None: a small file, of which the hub keeps none
    revision: str = "main"  # the commit; older listings do not say it


@dataclass(frozen=True)
class HubDocuments(Documents):
    repo: str
    train_files: tuple[HubFile, ...]
    val_file: HubFile
    folder: Path  # where they are kept
    column: str
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> list:
        files = [[f.name, f.size, f.sha256 or f.revision] for f in self.all_files()]
        return ["hub", formats.VERSION, self.repo, self.column, *files]

    def all_files(self) -> tuple[HubFile, ...]:
        return tuple(dict.fromkeys((*self.train_files, self.val_file)))

    def path(self, file: HubFile) -> Path:
        return self.folder / file.name

    def fetch(self, file: HubFile, on_block: Callable[[int], object] = lambda n: None) -> Path:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo, file.name, repo_type="dataset", revision=file.revision)
        return hub.fetch(url, self.path(file), size=file.size, sha256=file.sha256, on_block=on_block)

    def files(self, split: str) -> Iterator[Iterator[str]]:
        for path in self.fetched(self.train_files if split == "train" else (self.val_file,)):
            texts = texts_of(path, self.column)
            yield shared_out(texts, split) if self.val_file in self.train_files else texts

    def fetched(
        self, files: Iterable[HubFile], prefetch: int = PREFETCH, progress: Callable[[int], object] = lambda n: None
    ) -> Iterator[Path]:
        """The files in order, while the `prefetch` next ones are fetched. A failure is raised where that file's
        path would come, and ends the other downloads. progress(bytes) is called for what comes of any."""
        stop = threading.Event()

        def on_block(n: int) -> None:
            if stop.is_set():
                raise hub.Stopped
            progress(n)

        pool, pending = ThreadPoolExecutor(prefetch), deque[Future[Path]]()
        try:
            for file in files:
                pending.append(pool.submit(self.fetch, file, on_block))
                if len(pending) > prefetch:
                    yield pending.popleft().result()
            for job in pending:
                yield job.result()
        finally:  # also where the walk ends early, and at Ctrl-C: downloads end at their next block
            stop.set()
            pool.shutdown(cancel_futures=True)


def hub_documents(
    name: str, subfolder: str | None, n_shards: int, cache_dir: Path, *, column: str = "text"
) -> HubDocuments:
    """The first n_shards training files of a dataset and its validation file (`split_names`). Nothing is fetched but
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
    files = {f.name: f for f in _listing(repo, subfolder, folder)}
    train, val = split_names(list(files))
    if len(train) < n_shards:
        raise UserError(f"{repo} has {len(train)} training files; data.hub_shards={n_shards} (-n) asks for more")
    wanted = tuple(files[n] for n in train[:n_shards])
    return HubDocuments(repo, wanted, files[val], folder, column, of_one_file(train, val))


def _listing(repo: str, subfolder: str, folder: Path) -> list[HubFile]:
    """The dataset's files of documents below a folder, by name; from the cache where they were listed before."""
    path = folder / subfolder / LISTING
    with writing(path.parent):
        known = read_json(path, list)
        if known is None:
            known = [asdict(f) for f in _list(repo, subfolder)]
            atomic_write_json(path, known)
    return [HubFile(**f) for f in known]


def _list(repo: str, subfolder: str) -> list[HubFile]:
    """Asks the hub. The files are all of one kind: parquet where there is any, else JSON lines, else text."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()

    def ask() -> list[HubFile]:
        commit = api.dataset_info(repo).sha or "main"
        tree = api.list_repo_tree(repo, subfolder or None, recursive=True, revision=commit, repo_type="dataset")
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        return [HubFile(e.path, e.size, e.lfs.sha256 if e.lfs else None, commit) for e in entries]

    url = f"{api.endpoint}/datasets/{repo}/{subfolder}".rstrip("/")
    found = [(kind, file) for file in hub.retrying(url, ask) if (kind := kind_of(file.name))]
    for wanted in ("parquet", "lines", "text"):
        if files := [file for kind, file in found if kind == wanted]:
            return sorted(files, key=lambda f: f.name)
    raise UserError(f"{url} holds no .parquet, .jsonl or .txt files; see data.hub_pretrain, hub_folder")

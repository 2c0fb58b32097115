"""The CORE bundle as karpathy/nanochat publishes it: one archive, fetched, checked and unpacked into the cache.

Its publisher states no checksum. What can be checked is the size that the server names and, member by member, the sizes
and CRCs of the archive; the SHA-256 of what came is written down beside it, in `source.json`.
"""

import csv
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from nanochat_jax.config import RunConfig
from nanochat_jax.data import hub
from nanochat_jax.data.cache import ELSEWHERE, check_space
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, part_of, read_json

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
FOLDER = "core"  # in the cache of downloads
FILES = ("core.yaml", "eval_meta_data.csv")  # what makes a folder a bundle
ADVICE = (
    "the same command goes on from what came; without a network, run it where there is one and copy runs/cache/hub/core"
    " here, or set evals.core_dir to a folder that holds the bundle"
)


def is_bundle(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def find_bundle(config: RunConfig, cache_dir: Path) -> Path | None:
    """The CORE bundle's folder: by the settings, else in the data folder or the cache of downloads; None if nowhere."""
    if config.evals.core_dir:
        return Path(config.evals.core_dir)
    folders = [Path(config.data.dir) / FOLDER] if config.data.dir else []
    return next((f for f in [*folders, Path(cache_dir) / "hub" / FOLDER] if is_bundle(f)), None)


@dataclass(frozen=True)
class CoreTask:
    label: str
    task_type: str  # of TASK_TYPES
    dataset_uri: str
    num_fewshot: int
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing, 0 to 1


def load_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks that core.yaml lists, in its order. UserError where the bundle is not one."""
    for name in FILES:
        if not (bundle / name).is_file():
            raise UserError(f"no {name} in {bundle}: set evals.core_dir to the folder of the CORE bundle")
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        chance = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in csv.DictReader(f)}
    entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    missing = [t["label"] for t in entries if t["label"] not in chance]
    if missing:
        raise UserError(f"eval_meta_data.csv in {bundle} has no random baseline for {', '.join(missing)}")
    return [
        CoreTask(
            label=t["label"],
            task_type=t["icl_task_type"],
            dataset_uri=t["dataset_uri"],
            num_fewshot=t["num_fewshot"][0],
            delimiter=t.get("continuation_delimiter", " "),
            baseline=chance[t["label"]],
        )
        for t in entries
    ]


def find_data(bundle: Path, task: CoreTask) -> tuple[Path | None, bool]:
    """(file, whether it is a stand-in). `squad.subset.jsonl` stands in for a `squad.jsonl` that is not there."""
    path = bundle / "eval_data" / task.dataset_uri
    if path.is_file():
        return path, False
    others = sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))
    return (others[0], True) if others else (None, False)


def core_bundle(cache_dir: Path, on_block: Callable[[int], object] = lambda n: None) -> tuple[Path, dict]:
    """The bundle's folder in the cache, fetched unless it is there, and {"url", "size", "sha256"} of its archive.

    UserError in one line where the archive cannot be fetched, is damaged, or is no bundle.
    """
    folder = Path(cache_dir) / FOLDER
    if not is_bundle(folder):
        from huggingface_hub import get_hf_file_metadata

        archive = folder.with_name("eval_bundle.zip")
        size = hub.retrying(URL, lambda: get_hf_file_metadata(URL, token=False).size, ADVICE)
        hub.fetch(URL, archive, size=size, on_block=on_block, advice=ADVICE)
        note = archive.with_name(archive.name + ".json")
        known = read_json(note) or {}
        source = {"url": URL, "size": known.get("size"), "sha256": known.get("sha256")}
        _unpack(archive, folder, source)
        archive.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    return folder, read_json(folder / "source.json") or {}


def _unpack(archive: Path, folder: Path, source: dict) -> None:
    """Makes `folder` of the archive, whole or not at all."""
    part = part_of(folder)
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in zipped.infolist():
                path, is_link = PurePosixPath(member.filename), stat.S_ISLNK(member.external_attr >> 16)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename or is_link:
                    name = repr(member.filename)
                    raise UserError(f"{archive} has a member {name}, which would lie outside of its folder; {ADVICE}")
            needed = sum(member.file_size for member in zipped.infolist())
            check_space(folder.parent, needed, f"{archive.name} unpacks to")
            zipped.extractall(part)  # compares the CRCs
        roots = [path.parent for path in part.rglob(FILES[0])]
        if not roots:
            raise UserError(f"{archive} holds no {FILES[0]}, so it is no CORE bundle; {ADVICE}")
        root = min(roots, key=lambda path: len(path.parts))
        atomic_write_json(root / "source.json", source)
        if folder.is_dir():  # what stood there is no bundle
            shutil.rmtree(folder)
        root.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:  # the last: encrypted, or packed otherwise
        archive.unlink()
        raise UserError(f"{source['url']} came damaged ({e}) and was removed; {ADVICE}") from None
    except OSError as e:
        raise UserError(f"cannot unpack {archive.name} into {folder} ({e.strerror or e}); {ELSEWHERE}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)

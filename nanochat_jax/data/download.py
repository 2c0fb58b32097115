"""Filling the cache of downloads ahead of a run, and what is in it."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nanochat_jax.data.bundle import core_bundle, find_data, is_bundle, load_tasks
from nanochat_jax.data.cache import ELSEWHERE, check_space
from nanochat_jax.data.hub import is_whole, part_of, task_table
from nanochat_jax.data.registry import LISTING, HubDocuments
from nanochat_jax.files import read_json


def download(documents: HubDocuments, workers: int) -> str:
    """Fetches what is missing of the documents' files, several at a time. A line that says what was done.

    UserError where the disk is too full for it, before anything is fetched, or where a file cannot be fetched; the
    other downloads are then stopped too. What came stays, and the next call resumes it.
    """
    files = documents.all_files()
    missing = [f for f in files if not is_whole(documents.path(f), f.size, f.sha256)]
    parts = [part for f in missing if (part := part_of(documents.path(f))).is_file()]
    size, here = sum(f.size or 0 for f in missing), _bytes(parts)
    check_space(documents.folder, size - here, "what is missing are", f"take fewer files (-n), {ELSEWHERE}")
    began = time.perf_counter()
    with _bar(disable=not missing) as bar:
        task = bar.add_task(f"{len(missing)} files", total=size or None, completed=here)
        paths = list(documents.fetched(files, workers, lambda n: bar.advance(task, n)))
    seconds, came = time.perf_counter() - began, bar.tasks[task].completed - here
    rate = f" at {came / seconds / 1e6:.1f} MB/s" if came else ""
    return (
        f"{documents.repo}: {len(files) - 1} training files and 1 for validation, "
        f"{_gigabytes(paths)} in {documents.folder}; "
        f"{came / 1e9:.2f} GB of it fetched now{rate}"
    )


def download_tables(tables: list[tuple[str, str | None, str]], cache_dir: Path) -> list[str]:
    """Loads (dataset, configuration, split) tables into the cache that runs read. A line on each."""
    lines = []
    for repo, config, split in tables:
        rows = task_table(repo, config, split, cache_dir)
        lines.append(f"{' '.join(filter(None, (repo, config, split)))}: {len(rows):,} rows in {cache_dir}")
    return lines


def download_core(cache_dir: Path) -> str:
    """Fetches the CORE bundle into the cache that runs read. A line on it."""
    with _bar() as bar:
        task = bar.add_task("the CORE bundle", total=None)
        folder, source = core_bundle(cache_dir, on_block=lambda n: bar.advance(task, n))
    tasks = load_tasks(folder)
    have = sum(find_data(folder, task)[0] is not None for task in tasks)
    came = f"; from {source['url']}, SHA-256 {source['sha256']}, which its publisher does not state" if source else ""
    return f"CORE: {have} of {len(tasks)} tasks have their data in {folder}{came}"


def _bar(disable: bool = False) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=disable)


def contents(cache_dir: Path) -> list[str]:
    """A line on each dataset in the cache: its files that are whole, those that are half here, and their bytes."""
    lines = []
    for folder in sorted(p for p in cache_dir.glob("*") if p.is_dir()):
        listed = [entry for path in folder.rglob(LISTING) for entry in read_json(path, list) or ()]
        files = [p for p in folder.rglob("*") if p.is_file()]
        if listed:
            noted = [p.with_suffix("") for p in files if p.suffix == ".json" and p.with_suffix("").is_file()]
            whole = [p for p in noted if (read_json(f"{p}.json") or {}).get("size") == p.stat().st_size]
            parts = [p for p in files if p.suffix == ".part" and p.stat().st_size]
            half = f", {len(parts)} half here ({_gigabytes(parts)})" if parts else ""
            name = folder.name.replace("--", "/", 1)
            lines.append(f"{name}: {len(whole)} of {len(listed)} files whole ({_gigabytes(whole)}){half}")
        elif tables := [p for p in files if p.suffix == ".arrow"]:
            lines.append(f"{folder.name.replace('___', '/', 1)}: {len(tables)} tables ({_gigabytes(tables)})")
        elif is_bundle(folder):
            lines.append(f"{folder.name}: the CORE bundle, {len(files)} files ({_gigabytes(files)})")
    return lines


def _bytes(files: list[Path]) -> int:
    return sum(p.stat().st_size for p in files)


def _gigabytes(files: list[Path]) -> str:
    return f"{_bytes(files) / 1e9:.2f} GB"

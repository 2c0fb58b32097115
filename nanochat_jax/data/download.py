"""Filling the cache of downloads ahead of a run, and what is in it."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

from nanochat_jax.data.bundle import core_bundle, find_data, is_bundle, load_tasks
from nanochat_jax.data.hub import ELSEWHERE, Stopped, is_whole, task_table
from nanochat_jax.data.registry import LISTING, HubDocuments, HubFile
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json


def download(documents: HubDocuments, workers: int) -> str:
    """Fetches what is missing of the documents' files, several at a time. A line that says what was done.

    UserError where the disk is too full for it, before anything is fetched, or where a file is not to be had; the
    others are then stopped too. What came stays, and the next call goes on from there.
    """
    files = documents.files()
    missing = [f for f in files if not is_whole(documents.path(f), f.size, f.sha256)]
    size, here = sum(f.size or 0 for f in missing), sum(_parts(documents.path(f)) for f in missing)
    _check_room(documents.folder, size - here)
    began, came, stop, lock = time.perf_counter(), 0, threading.Event(), threading.Lock()
    with _bar(size, here, len(missing)) as advance, ThreadPoolExecutor(workers) as pool:

        def watch(n: int) -> None:
            nonlocal came
            if stop.is_set():
                raise Stopped
            with lock:
                came += n
            advance(n)

        def fetch(file: HubFile) -> None:
            try:
                documents.fetch(file, watch)
            except BaseException:
                stop.set()
                raise

        jobs = [pool.submit(fetch, f) for f in files]
        try:
            for job in as_completed(jobs):
                with suppress(Stopped):  # the one for whose failure it was stopped comes too
                    job.result()
        except BaseException:  # Ctrl-C too: those under way end at their next block
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = max(time.perf_counter() - began, 1e-9)
    whole = sum(documents.path(f).stat().st_size for f in files)
    rate = f" at {came / seconds / 1e6:.1f} MB/s" if came else ""
    return (
        f"{documents.repo}: {len(files) - 1} training files and 1 for validation, {whole / 1e9:.2f} GB in "
        f"{documents.folder}; {came / 1e9:.2f} GB of it fetched now{rate}"
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
    with _bar(0, 0, 1) as advance:
        folder, source = core_bundle(cache_dir, on_block=advance)
    tasks = load_tasks(folder)
    have = sum(find_data(folder, task)[0] is not None for task in tasks)
    came = f"; from {source['url']}, SHA-256 {source['sha256']}, which its publisher does not state" if source else ""
    return f"CORE: {have} of {len(tasks)} tasks have their data in {folder}{came}"


def _parts(path: Path) -> int:
    part = path.with_name(path.name + ".part")
    return part.stat().st_size if part.is_file() else 0


def _check_room(folder: Path, needed: int) -> None:
    """UserError where `needed` bytes do not fit on the disk of a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror or e}); {ELSEWHERE}") from None
    if needed > free:
        raise UserError(
            f"what is missing are {needed / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB free; take "
            f"fewer files (-n), {ELSEWHERE}"
        )


@contextmanager
def _bar(size: int, here: int, n_files: int):
    """A progress bar on stderr while there is something to fetch; gives what moves it on by so many bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), disable=not n_files) as progress:
        task = progress.add_task(f"{n_files} files", total=size or None, completed=here)
        yield lambda n: progress.advance(task, n)


# ------------------------------------------------------------------------------------------------------- ls


def contents(cache_dir: Path) -> list[str]:
    """A line on each dataset in the cache: its files that are whole, those that are half here, and their bytes."""
    lines = []
    for folder in sorted(p for p in cache_dir.glob("*") if p.is_dir()):
        listed = sum(len(read_json(p)) for p in folder.rglob(LISTING))
        files = [p for p in folder.rglob("*") if p.is_file()]
        parts = [p for p in files if p.suffix == ".part"]
        notes = [p for p in files if p.suffix == ".json" and p.with_suffix("").is_file()]
        whole = [p.with_suffix("") for p in notes if read_json(p).get("size") == p.with_suffix("").stat().st_size]
        if listed:
            half = f", {len(parts)} half here ({_gigabytes(parts)})" if parts else ""
            name = folder.name.replace("--", "/", 1)
            lines.append(f"{name}: {len(whole)} of {listed} files whole ({_gigabytes(whole)}){half}")
        elif tables := [p for p in files if p.suffix == ".arrow"]:
            lines.append(f"{folder.name.replace('___', '/', 1)}: {len(tables)} tables ({_gigabytes(tables)})")
        elif is_bundle(folder):
            lines.append(f"{folder.name}: the CORE bundle, {len(files)} files ({_gigabytes(files)})")
    return lines


def _gigabytes(files: list[Path]) -> str:
    return f"{sum(p.stat().st_size for p in files) / 1e9:.2f} GB"

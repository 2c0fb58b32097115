"""Packing of documents in a background process, beside training.

One process packs, in order. Every SHARD_ROWS rows it writes

    tokens_<n>.npy       the rows
    cropped_<n>.npy      the documents that were cropped, and after how many tokens
    resume_<n + 1>.npz   the documents that wait in the buffer, and the place in the documents
    manifest.json        which makes the shard count

in this order, each whole or not at all, and only then removes resume_<n>.npz: whenever it is killed, the files that
belong to the manifest are there. Its lock on the folder ends with it. Other processes that want the same rows read
them meanwhile, and pack the rest where rows are missing and the lock is free.

Where more rows are wanted than that makes, a second walk over the text packs what was cropped, in parts that a row can
hold, before any row comes again.
"""

import contextlib
import itertools
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.data.cache import writing
from nanochat_jax.data.documents import Documents
from nanochat_jax.data.fit import Buffer, best_fit
from nanochat_jax.data.packed import MANIFEST, dtype_of, write_arrays, write_shard
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, claim, read_json
from tokenizer.tokenizer import Tokenizer

COUNTS = ("rows", "documents", "tokens", "tokens_cropped")  # of each shard, and of all
REFILL = 256  # documents that the buffer takes in at a time: the more wait in it, the less is cropped
PAUSE = 0.5  # seconds between two tries for the lock
NICE = 10  # training has priority

# a walk over the files, a file, how many of its documents were taken, and how many of all files
Place = tuple[int, int, int, int]
AGAIN = -1  # the number of what was cropped before


class Document(NamedTuple):
    length: int  # tokens
    ids: np.ndarray  # as many of them as a row can hold
    number: int  # of the text, from 1 in the order of the walk


@dataclass(frozen=True)
class Job:
    """What to pack, and where. `goal` is the number of rows that are wanted; None for all."""

    folder: Path
    documents: Documents
    split: str
    tok: Tokenizer
    row_len: int
    buffer: int
    goal: int | None
    shard_rows: int

    def finished(self) -> dict | None:
        """The folder's manifest, where it has all that is wanted."""
        with writing(self.folder):
            manifest = read_json(self.folder / MANIFEST)
        if manifest and (manifest["complete"] or (self.goal is not None and manifest["rows"] >= self.goal)):
            return manifest
        return None


class Packer:
    """`pack(job, threads)` in a child process, which ends when it is done, when this process ends, or by `close`.

    The child is a fresh Python that imports neither jax nor, as those of multiprocessing do, this process's main
    module. Where it is killed, as the system does when memory is short, packing has failed.
    """

    def __init__(self, job: Job, threads: int, log: Callable[[str], None]):
        self._job, self._threads, self._log = job, threads, log
        self._error: Exception | None = None
        self._process: subprocess.Popen | None = None
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        link, theirs = Pipe()
        with self._lock, theirs:
            if self._closed:
                return
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": str(self._threads)},  # of `tokenizers`
            )
        with self._process, link:
            with contextlib.suppress(OSError):  # where it is killed; receiving will tell
                link.send((self._job, self._threads))
            while isinstance(message := _received(link), str):
                self._log(message)
        if not isinstance(message, (EOFError, OSError)):
            self._error = message
        elif not self._closed:
            status = self._process.returncode
            ending = f"status {status}" if status >= 0 else signal.Signals(-status).name
            self._error = UserError(
                f"packing into {self._job.folder} was killed ({ending}); is memory short? The same command goes on"
            )

    def working(self) -> bool:
        """Whether it still runs. UserError where packing failed."""
        if self._thread.is_alive():
            return True
        if self._error:
            raise self._error
        return False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process:
                self._process.kill()
        self._thread.join()


def serve(fd: int) -> None:
    """What the child runs: it is sent a job, and sends lines to log and at the end None or the error."""
    link = Connection(fd)
    os.dup2(2, 1)  # what is printed goes to stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    job, threads = link.recv()
    threading.Thread(target=_end_with_parent, args=[link], daemon=True).start()
    try:
        for line in pack(job, threads):
            link.send(line)
        link.send(None)
    except UserError as e:
        link.send(e)
    except Exception:
        link.send(RuntimeError(traceback.format_exc()))
    os._exit(0)  # without waiting for downloads


def _received(link: Connection):
    """The next message, or the error where the other process has ended, perhaps in the middle of one."""
    try:
        return link.recv()
    except (EOFError, OSError) as e:
        return e


def _end_with_parent(link: Connection) -> None:
    _received(link)  # nothing more is ever sent
    os._exit(1)


def pack(job: Job, threads: int) -> Iterator[str]:
    """Packs here until the goal is reached, tokenizing with `threads` threads. Yields lines to log.

    Waits while another process packs the same. UserError where the documents fill no row or cannot be fetched, or the
    rows cannot be written.
    """
    while not job.finished():
        with writing(job.folder):
            try:
                lock = claim(job.folder / ".lock")
            except UserError:
                lock = None
        if lock is None:
            time.sleep(PAUSE)
            continue
        with lock:
            if not job.finished():
                yield from _pack(job, threads)


def _pack(job: Job, threads: int) -> Iterator[str]:
    began = time.perf_counter()
    manifest, buffer, place = _resumed(job)
    first = manifest["rows"]

    crops: dict[int, int] = {}  # in the first walk's rows that are not written yet: of a document, its ids in the row

    def batches(walk: int) -> Iterator[list[Document]]:
        nonlocal place
        starts = _written_crops(job, len(manifest["shards"])) | crops if walk else None
        texts = _texts(job, place if place[0] == walk else (walk, 0, 0, 0))
        while batch := list(itertools.islice(texts, REFILL)):
            place = batch[-1][0]
            wanted = [(number, text) for (*_, number), text in batch if starts is None or number in starts]
            encoded = job.tok.encode_batch([text for _, text in wanted], num_threads=threads)
            each = ((ids, number, starts[number] if starts else None) for (number, _), ids in zip(wanted, encoded))
            yield [document for one in each for document in _documents(job, *one)]

    def all_rows() -> Iterator[list[tuple[Document, int]]]:
        length = operator.attrgetter("length")
        for walk in range(place[0], 2):
            for row in best_fit(batches(walk), job.row_len, job.buffer, crop=True, length=length, buffer=buffer):
                if walk == 0:
                    crops.update({d.number: taken - 1 for d, taken in row if taken < d.length})
                yield row

    rows = all_rows()
    while not manifest["complete"] and (job.goal is None or manifest["rows"] < job.goal):
        used = list(itertools.islice(rows, job.shard_rows))
        manifest["complete"] = len(used) < job.shard_rows
        if not used and not manifest["rows"]:
            raise UserError(
                f"the {job.split} documents do not fill one row of {job.row_len} tokens; give more text or a "
                "smaller model.sequence_len"
            )
        _add(job, manifest, used, crops, buffer, place)
        crops.clear()
    cropped = manifest["tokens_cropped"] / (manifest["tokens"] + manifest["tokens_cropped"])
    seconds = time.perf_counter() - began
    yield (
        f"packed rows: {manifest['rows']:,} of {job.row_len} from {manifest['documents']:,} {job.split} documents, "
        f"{100 * cropped:.1f} % of tokens cropped; the last {manifest['rows'] - first:,} in {seconds:.1f} s"
    )


def _texts(job: Job, place: Place) -> Iterator[tuple[Place, str]]:
    """The documents from a place on, each with the place after it."""
    walk, first, skip, number = place
    for i, texts in enumerate(itertools.islice(job.documents.files(job.split), first, None), first):
        for taken, text in enumerate(itertools.islice(texts, skip, None), skip + 1):
            number += 1
            yield (walk, i, taken, number), text
        skip = 0


def _documents(job: Job, ids: list[int], number: int, start: int | None) -> Iterator[Document]:
    """A text, or what is left of it from `start` on, in parts that a row can hold. Each begins with <|bos|>."""
    room, dtype = job.row_len - 1, dtype_of(job.tok)
    if start is None:
        yield Document(len(ids) + 1, np.array([job.tok.bos, *ids[:room]], dtype), number)
    else:
        for at in range(start, len(ids), room):
            part = np.array([job.tok.bos, *ids[at : at + room]], dtype)
            yield Document(len(part), part, AGAIN)


def _add(
    job: Job,
    manifest: dict,
    rows: list[list[tuple[Document, int]]],
    crops: dict[int, int],
    buffer: Buffer,
    place: Place,
) -> None:
    """Writes a shard (none where there are no rows), what it takes to resume after it, and the manifest with it."""
    n = len(manifest["shards"])
    with writing(job.folder):
        if rows:
            used = [(document, taken) for row in rows for document, taken in row]
            tokens = np.concatenate([document.ids[:taken] for document, taken in used]).reshape(-1, job.row_len)
            shard = write_shard(job.folder, n, {"tokens": tokens})
            write_arrays(_crops(job, n), np.save, np.array([*crops.items()], np.int64).reshape(-1, 2))
            shard |= {"documents": sum(d.number != AGAIN for d, _ in used), "tokens": tokens.size}
            # of what was cropped before, all but its <|bos|> is not any more
            shard["tokens_cropped"] = sum(1 if d.number == AGAIN else d.length for d, _ in used) - tokens.size
            manifest["shards"].append(shard)
            for name in COUNTS:
                manifest[name] += shard[name]
        if not manifest["complete"]:
            waiting = buffer.in_order()
            state = {"lengths": np.array([d.length for d in waiting], np.int64), "place": np.array(place, np.int64)}
            state["ids"] = np.concatenate([np.empty(0, manifest["dtype"]), *(d.ids for d in waiting)])
            state["numbers"] = np.array([d.number for d in waiting], np.int64)
            write_arrays(_resume(job, n + 1), np.savez, **state)
        atomic_write_json(job.folder / MANIFEST, manifest)
        _resume(job, n).unlink(missing_ok=True)


def _resumed(job: Job) -> tuple[dict, Buffer[Document], Place]:
    """(manifest, buffer, place) as they were left; from the beginning where nothing was, or it cannot be read."""
    manifest = read_json(job.folder / MANIFEST)
    with writing(job.folder):  # removes what a killed packer left
        states = set(job.folder.glob("resume_*")) - {_resume(job, len(manifest["shards"]) if manifest else 0)}
        for left in states.union(job.folder.glob(".*.part")):
            left.unlink(missing_ok=True)
    if manifest:
        try:
            return manifest, *_read_state(job, len(manifest["shards"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # the same rows come out again, so that what others have read of them stays right
    manifest = {"row_len": job.row_len, "dtype": dtype_of(job.tok).name, "masked": False, "tokenizer": job.tok.hash}
    manifest |= {"shard_rows": job.shard_rows, "complete": False, "shards": [], **dict.fromkeys(COUNTS, 0)}
    return manifest, Buffer(), (0, 0, 0, 0)


def _read_state(job: Job, n: int) -> tuple[Buffer[Document], Place]:
    buffer: Buffer[Document] = Buffer()
    with np.load(_resume(job, n)) as state:
        lengths, (walk, file, taken, number) = state["lengths"], state["place"].tolist()
        ends = np.minimum(lengths, job.row_len).cumsum()
        for length, ids, n in zip(lengths.tolist(), np.split(state["ids"], ends), state["numbers"].tolist()):
            buffer.add(length, Document(length, ids, n))
    return buffer, (walk, file, taken, number)


def _written_crops(job: Job, shards: int) -> dict[int, int]:
    """Of each document that was cropped in the first walk, by its number, how many ids are in the written rows."""
    try:
        written = [np.load(_crops(job, n)).tolist() for n in range(shards)]
    except (OSError, ValueError, EOFError):
        raise UserError(f"{job.folder} is damaged; remove it to have it packed anew") from None
    return dict(itertools.chain.from_iterable(written))


def _crops(job: Job, n: int) -> Path:
    return job.folder / f"cropped_{n:05d}.npy"


def _resume(job: Job, n: int) -> Path:
    return job.folder / f"resume_{n:05d}.npz"

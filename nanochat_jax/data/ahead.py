"""Packing of documents in processes of its own, ahead of training and beside it.

One process packs, in order, so the rows do not depend on how many workers tokenize for it. Of n workers the k-th
tokenizes every n-th piece of the documents, from the k-th on. Every SHARD_ROWS rows the packer writes

    tokens_<n>.npy       the rows
    resume_<n + 1>.npz   what waits in the buffer, and the place in the documents
    manifest.json        which makes the shard count

in this order, each whole or not at all, and only then removes resume_<n>.npz: whenever it is killed, the files that
belong to the manifest are there. Its lock on the folder ends with it. Other processes that want the same rows read
them meanwhile, and pack the rest where rows are missing and the lock is free.
"""

import itertools
import operator
import threading
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.children import Child, Killed
from nanochat_jax.data.fit import Buffer, best_fit
from nanochat_jax.data.packed import MANIFEST, dtype_of, write_shard, write_whole, writing
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, claim, read_json

COUNTS = ("rows", "documents", "tokens", "tokens_cropped")  # of each shard, and of all
REFILL = 256  # documents that the buffer takes in at a time: the more wait in it, the less is cropped
BATCH = 128  # documents that a worker hands over at a time
PAUSE = 0.5  # seconds between two tries for the lock
RESTARTS = 3  # of a packer that was killed, as the system does when memory is short

Document = tuple[int, bytes]  # tokens, and the ids of as many of them as a row can hold
Message = tuple[array, bytes]  # the lengths of some documents, and the ids of all of them
Place = tuple[int, int]  # a piece, and how many of its documents were taken


@dataclass(frozen=True)
class Job:
    """What to pack, and where. `goal` is the number of rows that are wanted; None for all."""

    folder: Path
    documents: Any
    split: str
    tok: Any
    row_len: int
    buffer: int
    goal: int | None
    shard_rows: int

    def at_hand(self) -> dict | None:
        """The folder's manifest, where it has all that is wanted."""
        with writing(self.folder):
            manifest = read_json(self.folder / MANIFEST)
        if manifest and (manifest["complete"] or (self.goal is not None and manifest["rows"] >= self.goal)):
            return manifest
        return None


class Packer:
    """`pack(job, workers)` in a process of its own, which ends when it is done, with this one, or by `close`."""

    def __init__(self, job: Job, workers: int, log: Callable[[str], None]):
        self._job, self._workers, self._log, self._restarts = job, workers, log, RESTARTS
        self._start()

    def _start(self) -> None:
        self._error: Exception | None = None
        self._child = Child(_packing, self._job, self._workers)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        try:
            for line in self._child:
                self._log(line)
        except Exception as e:
            self._error = e

    @property
    def pid(self) -> int:
        return self._child.pid

    def working(self) -> bool:
        """Whether it still runs; it is started again where it was killed. UserError where packing failed."""
        if self._listener.is_alive():
            return True
        if self._error is None:
            return False
        if not isinstance(self._error, Killed):
            raise self._error
        if not self._restarts:
            raise UserError(f"packing into {self._job.folder}: {self._error}, again and again; is memory short?")
        self._restarts -= 1
        self._child.close()
        self._start()
        return True

    def close(self) -> None:
        self._restarts = 0
        self._child.close()
        self._listener.join()


def _packing(received, job: Job, workers: int) -> Iterator[str]:
    return pack(job, workers)


def pack(job: Job, workers: int) -> Iterator[str]:
    """Packs until the goal is reached, here, with `workers` children (0: none) that tokenize. Yields lines to log.

    Waits while another process packs the same. UserError where the documents fill no row or cannot be had, or the rows
    cannot be written.
    """
    while not job.at_hand():
        with writing(job.folder):
            try:
                lock = claim(job.folder / ".lock")
            except UserError:
                lock = None
        if lock is None:
            time.sleep(PAUSE)
            continue
        with lock:
            if not job.at_hand():
                yield from _pack(job, workers)


def _pack(job: Job, workers: int) -> Iterator[str]:
    began, size = time.perf_counter(), dtype_of(job.tok).itemsize
    manifest, buffer, place = _resumed(job)
    first, stream = manifest["rows"], _Stream(job, workers, place)
    rows = best_fit(stream.batches(), job.row_len, job.buffer, crop=True, length=operator.itemgetter(0), buffer=buffer)
    try:
        while not manifest["complete"] and (job.goal is None or manifest["rows"] < job.goal):
            used = list(itertools.islice(rows, job.shard_rows))
            manifest["complete"] = len(used) < job.shard_rows
            if not used and not manifest["rows"]:
                raise UserError(
                    f"the {job.split} documents do not fill one row of {job.row_len} tokens; give more text or a "
                    "smaller model.sequence_len"
                )
            ids = b"".join(ids[: taken * size] for row in used for (_, ids), taken in row)
            tokens = np.frombuffer(ids, manifest["dtype"]).reshape(-1, job.row_len)
            _add(job, manifest, tokens, [length for row in used for (length, _), _ in row], buffer, stream.place)
    finally:
        stream.close()
    cropped = manifest["tokens_cropped"] / (manifest["tokens"] + manifest["tokens_cropped"])
    seconds = time.perf_counter() - began
    yield (
        f"packed rows: {manifest['rows']:,} of {job.row_len} from {manifest['documents']:,} {job.split} documents, "
        f"{100 * cropped:.1f} % of tokens cropped; the last {manifest['rows'] - first:,} in {seconds:.1f} s"
    )


def _add(job: Job, manifest: dict, tokens: np.ndarray, lengths: list[int], buffer: Buffer, place: Place) -> None:
    """Writes a shard (none where there are no rows), what it takes to resume after it, and the manifest with it."""
    n = len(manifest["shards"])
    with writing(job.folder):
        if len(tokens):
            shard = write_shard(job.folder, n, {"tokens": tokens})
            shard |= {"documents": len(lengths), "tokens": tokens.size, "tokens_cropped": sum(lengths) - tokens.size}
            manifest["shards"].append(shard)
            for name in COUNTS:
                manifest[name] += shard[name]
        if not manifest["complete"]:
            waiting = buffer.in_order()
            lengths_of = np.array([length for length, _ in waiting], np.int64)
            ids = np.frombuffer(b"".join(ids for _, ids in waiting), manifest["dtype"])
            state = partial(np.savez, lengths=lengths_of, ids=ids, place=np.array(place, np.int64))
            write_whole(_resume(job, n + 1), state)
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
    return manifest, Buffer(), (0, 0)


def _read_state(job: Job, n: int) -> tuple[Buffer[Document], Place]:
    buffer: Buffer[Document] = Buffer()
    with np.load(_resume(job, n)) as state:
        for document in _documents(job, state["lengths"].tolist(), state["ids"].tobytes()):
            buffer.add(document[0], document)
        piece, taken = state["place"].tolist()
    return buffer, (piece, taken)


def _documents(job: Job, lengths: Iterable[int], ids: bytes) -> Iterator[Document]:
    """Documents whose ids, of each as many as a row can hold, stand one after the other."""
    at, size = 0, dtype_of(job.tok).itemsize
    for length in lengths:
        end = at + min(length, job.row_len) * size
        yield length, ids[at:end]
        at = end


def _resume(job: Job, n: int) -> Path:
    return job.folder / f"resume_{n:05d}.npz"


class _Stream:
    """Tokenized documents from a place on; `place` advances with them."""

    def __init__(self, job: Job, workers: int, place: Place):
        self._job, self.place = job, place
        self._children = [Child(_tokenizing, job, worker, workers, *place) for worker in range(workers)]

    def batches(self) -> Iterator[list[Document]]:
        documents = self._tokenized()
        return iter(lambda: list(itertools.islice(documents, REFILL)), [])

    def _tokenized(self) -> Iterator[Document]:
        piece, taken = self.place
        for message in self._messages():
            if message is None:
                piece, taken = piece + 1, 0
                continue
            for document in _documents(self._job, *message):
                taken += 1
                self.place = piece, taken
                yield document

    def _messages(self) -> Iterator[Message | None]:
        """What `tokenize` yields of all pieces, in order."""
        if not self._children:
            yield from tokenize(self._job, 0, 1, *self.place)
            return
        for piece in itertools.count(self.place[0]):
            child = self._children[piece % len(self._children)]
            try:
                while (message := next(child)) is not None:
                    yield message
            except StopIteration:  # it has no such piece, so nobody has one after it
                return
            yield None

    def close(self) -> None:
        for child in self._children:
            child.close()


def _tokenizing(received, *args) -> Iterator[Message | None]:
    return tokenize(*args)


def tokenize(job: Job, worker: int, workers: int, first: int, skip: int) -> Iterator[Message | None]:
    """Every workers-th piece from `first` on, some documents at a time, and None after each piece.

    A document's ids begin with <|bos|> and end where a row does; its length counts all of them. `skip` leaves out so
    many documents of the first piece.
    """
    kind = "H" if dtype_of(job.tok).itemsize == 2 else "I"
    pieces = itertools.islice(job.documents.pieces(job.split), first, None)
    for i, piece in enumerate(pieces, first):
        if i % workers != worker:
            continue
        texts = itertools.islice(piece.texts(), skip if i == first else 0, None)
        while batch := list(itertools.islice(texts, BATCH)):
            lengths, ids = array("I"), array(kind)
            for text in batch:
                document = job.tok.encode(text)
                lengths.append(len(document) + 1)
                ids.append(job.tok.bos)
                ids.extend(document[: job.row_len - 1])
            yield lengths, ids.tobytes()
        yield None

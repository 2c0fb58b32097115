"""Pretraining documents, and those in a folder of files.

The validation split is pinned: in a folder or on the hub it is the last file by name, whatever the number of training
files, so that bits per byte compare between runs.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from nanochat_jax import formats
from nanochat_jax.errors import UserError
from nanochat_jax.formats import kind_of, texts_of

SAMPLES, SAMPLE = 16, 1 << 16  # of a file, and the bytes of each, that stand for its contents


class Documents(Protocol):
    """Documents of two splits, train and val. The process that packs gets a pickled copy."""

    @property
    def key(self) -> list:
        """Plain data that names the contents: what is packed from equal keys is equal."""

    def files(self, split: str) -> Iterator[Iterator[str]]:
        """The documents of each file of a split, in an order that is the same in every process. Files of the hub are
        fetched when the walk reaches them. UserError where that fails."""

    def train(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.files("train"))

    def val(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.files("val"))


def local_documents(folder: Path, column: str = "text") -> FileDocuments:
    """The files in and below folder/pretrain or, where there is no such folder, those in `folder` itself. UserError
    where there are fewer than two."""
    root = folder / "pretrain"
    found = root.rglob("*") if root.is_dir() else folder.glob("*")
    root = root if root.is_dir() else folder
    names = sorted(p.relative_to(root).as_posix() for p in found if kind_of(p.name) and p.is_file())
    train, val = split_names(names)
    if not train:
        raise UserError(
            f"{root} holds {len(names)} files of documents (.parquet; .jsonl or .txt, also .gz or .zst); "
            "it takes two or more, the last for validation"
        )
    return FileDocuments(root, tuple(train), val, column)


_SPLIT = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test)(?=[-_./])")


def split_names(names: Sequence[str]) -> tuple[list[str], str]:
    """(training files, the validation file) of sorted names; no training files where there are too few.

    The last is validation. Where every name says its split, as the hub's do (train-00000-of-00004.parquet, val/0.txt),
    a test split is left out, and training files are those of train.
    """
    said = [m and m[1] for m in map(_SPLIT.search, names)]
    if all(said) and "train" in said:
        held = [n for n, split in zip(names, said) if split not in ("train", "test")]
        train = [n for n, split in zip(names, said) if split == "train"]
        return (train, held[-1]) if held else (train[:-1], train[-1])
    return list(names[:-1]), names[-1] if names else ""


@dataclass(frozen=True)
class FileDocuments(Documents):
    """Files in and below a folder, by their names there."""

    root: Path
    train_names: tuple[str, ...]
    val_name: str
    column: str

    @cached_property
    def key(self) -> list:
        files = [[name, *_contents(self.root / name)] for name in (*self.train_names, self.val_name)]
        return ["files", formats.VERSION, self.column, *files]

    def files(self, split: str) -> Iterator[Iterator[str]]:
        names = self.train_names if split == "train" else (self.val_name,)
        return (texts_of(self.root / name, self.column) for name in names)


def _contents(path: Path) -> tuple[int, str]:
    """(size, hash) of a file. Of one beyond a megabyte only samples, its beginning and its end among them: reading all
    would take minutes of a large folder, and a parquet footer or a checksum at the end tells most changes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            whole = size <= SAMPLES * SAMPLE
            for i in range(1 if whole else SAMPLES):
                file.seek(i * (size - SAMPLE) // (SAMPLES - 1) if i else 0)
                digest.update(file.read(size if whole else SAMPLE))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    return size, digest.hexdigest()[:16]

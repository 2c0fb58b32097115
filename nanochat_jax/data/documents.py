"""Pretraining documents, and those in a folder of files.

The validation split is pinned: in a folder or on the hub it is the last file by name, whatever the number of training
files, so that bits per byte compare between runs. Of a single file it is every `HELD`th document.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from nanochat_jax import formats
from nanochat_jax.errors import UserError
from nanochat_jax.files import content_hashes
from nanochat_jax.formats import kind_of, some, texts_of

HELD = 20


class Documents(Protocol):
    """Documents of two splits, train and val. The process that packs gets a pickled copy."""

    notes: tuple[str, ...] = ()  # lines on what is not read

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


def local_documents(folder: Path, column: str, cache_dir: Path) -> FileDocuments:
    """The files in and below folder/pretrain or, where there is no such folder, those in `folder` itself. UserError
    where there are none. cache_dir: where their hashes are kept."""
    root = folder / "pretrain"
    paths = root.rglob("*") if root.is_dir() else folder.glob("*")
    root = root if root.is_dir() else folder
    found = sorted(p.relative_to(root).as_posix() for p in paths if not p.name.startswith(".") and p.is_file())
    names = [name for name in found if kind_of(name)]
    others = [name for name in found if not kind_of(name)]
    train, val = split_names(names)
    if not train:
        raise UserError(
            f"{root} holds no files of documents (.parquet; .jsonl or .txt, also .gz or .zst); "
            "put text there, or name another folder by data.dir"
        )
    others += sorted({*names} - {*train, val})
    notes = (f"{some(others)} in {root} not read as documents",) if others else ()
    return FileDocuments(root, tuple(train), val, column, cache_dir, (*notes, *of_one_file(train, val)))


_SPLIT = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test)(?=[-_./])")


def split_names(names: Sequence[str]) -> tuple[list[str], str]:
    """(training files, the validation file) of sorted names. The last is validation, and trained on as well where it is
    alone: see `shared_out`. Where every name says its split, as the hub's do (train-00000-of-00004.parquet, val/0.txt),
    a test split is left out, and training files are those of train.
    """
    said = [m and m[1] for m in map(_SPLIT.search, names)]
    if all(said) and "train" in said:
        held = [n for n, split in zip(names, said) if split not in ("train", "test")]
        train = [n for n, split in zip(names, said) if split == "train"]
        return (train, held[-1]) if held else (train[:-1] or train, train[-1])
    return list(names[:-1] or names), names[-1] if names else ""


def of_one_file(train: Sequence[str], val: str) -> tuple[str, ...]:
    """What to say where the validation file is trained on as well."""
    if val not in train:
        return ()
    return (f"{val} is the only file to train on: every {HELD}th of its documents is for validation",)


def shared_out(texts: Iterator[str], split: str) -> Iterator[str]:
    """The split's documents of a file that is all there is: the first and every `HELD`th from there are validation."""
    return (text for i, text in enumerate(texts) if (i % HELD == 0) == (split == "val"))


@dataclass(frozen=True)
class FileDocuments(Documents):
    """Files in and below a folder, by their names there."""

    root: Path
    train_names: tuple[str, ...]
    val_name: str
    column: str
    cache_dir: Path
    notes: tuple[str, ...] = ()

    @cached_property
    def key(self) -> list:
        names = (*self.train_names, self.val_name)
        hashes = content_hashes([self.root / name for name in names], self.cache_dir / "hashes.json")
        return ["files", formats.VERSION, self.column, *map(list, zip(names, hashes))]

    def files(self, split: str) -> Iterator[Iterator[str]]:
        names = self.train_names if split == "train" else (self.val_name,)
        each = (texts_of(self.root / name, self.column) for name in names)
        return (shared_out(texts, split) for texts in each) if self.val_name in self.train_names else each

"""Where pretraining documents come from: a folder of parquet shards, the hub, or what stands on every machine.

    documents = open_documents(config.data, cache_dir)
    for text in documents.train(): ...

The validation split is pinned: in a folder or on the hub it is the last shard by name, whatever the number of training
shards, so that bits per byte compare between runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nanochat_jax.config import DataConfig
from nanochat_jax.errors import UserError


class Documents(Protocol):
    @property
    def key(self) -> list:
        """Plain data that names the contents: what is packed from equal keys is equal."""

    def train(self) -> Iterator[str]: ...

    def val(self) -> Iterator[str]: ...


def source_of(data: DataConfig) -> str:
    """embedded, local or hub."""
    if data.source != "auto":
        return data.source
    return "local" if data.dir else "embedded"


def open_documents(data: DataConfig, cache_dir: Path) -> Documents:
    """The documents that the settings ask for. UserError where they are not to be had."""
    source = source_of(data)
    if source == "embedded":
        from nanochat_jax.data.embedded import EmbeddedDocuments

        return EmbeddedDocuments()
    if source == "local":
        return local_documents(Path(data.dir))
    from nanochat_jax.data.hub import pretrain_files

    train, val = pretrain_files(data.hub_pretrain, data.hub_shards, Path(cache_dir) / "hub")
    return ParquetDocuments(tuple(train), val)


def local_documents(folder: Path) -> ParquetDocuments:
    """The shards of folder/pretrain; the last by name is validation. UserError where there are fewer than two."""
    shards = sorted((folder / "pretrain").glob("*.parquet"))
    if len(shards) < 2:
        raise UserError(
            f"{folder / 'pretrain'} holds {len(shards)} parquet shards; it takes two or more, the last for validation"
        )
    return ParquetDocuments(tuple(shards[:-1]), shards[-1])


@dataclass(frozen=True)
class ParquetDocuments:
    """Shards with a column `text`."""

    train_shards: tuple[Path, ...]
    val_shard: Path

    @property
    def key(self) -> list:
        return [[p.name, p.stat().st_size] for p in (*self.train_shards, self.val_shard)]

    def train(self) -> Iterator[str]:
        for shard in self.train_shards:
            yield from parquet_texts(shard)

    def val(self) -> Iterator[str]:
        yield from parquet_texts(self.val_shard)


def parquet_texts(path: Path) -> Iterator[str]:
    """The column `text` of a shard, a row group at a time. UserError where the file is not such a shard."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path} has no column `text`; it has {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            for text in file.read_row_group(group, columns=["text"]).column("text").to_pylist():
                if text:
                    yield text
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(f"{path} cannot be read as parquet ({str(e).splitlines()[0]}); fetch it again") from None


def text_key(texts: Iterator[str]) -> str:
    """16 hex digits of a hash of texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]

"""Where pretraining documents come from: a folder of files, the hub, or what stands on every machine."""

from pathlib import Path

from nanochat_jax.config import DataConfig
from nanochat_jax.data.documents import Documents, local_documents
from nanochat_jax.data.embedded import EmbeddedDocuments
from nanochat_jax.data.registry import hub_documents


def source_of(data: DataConfig) -> str:
    """embedded, local or hub."""
    if data.source != "auto":
        return data.source
    return "local" if data.dir else "embedded"


def open_documents(data: DataConfig, cache_dir: Path) -> Documents:
    """The documents that the settings ask for. UserError where they are not to be had."""
    source = source_of(data)
    if source == "embedded":
        return EmbeddedDocuments(Path(cache_dir))
    if source == "local":
        return local_documents(Path(data.dir or "."), data.text_column, Path(cache_dir))
    return hub_documents(
        data.hub_pretrain, data.hub_folder, data.hub_shards, Path(cache_dir) / "hub", column=data.text_column
    )

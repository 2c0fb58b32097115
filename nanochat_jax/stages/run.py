"""A run directory, and what its stages read from it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nanochat_jax import checkpoint, devices
from nanochat_jax.config import GPTConfig, RunConfig
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.data.packing import pack_split
from nanochat_jax.data.sources import open_documents
from nanochat_jax.mesh import sharding
from nanochat_jax.mesh.preemption import Stop
from nanochat_jax.model import scaling
from nanochat_jax.tracking.tracking import RunLog
from tokenizer import Tokenizer, load_tokenizer


@dataclass
class Run:
    """A run directory with what its stages share. Everything costly is made when first asked for."""

    dir: Path
    config: RunConfig
    log: RunLog
    stop: Stop

    @cached_property
    def cache_dir(self) -> Path:
        return Path(self.config.data.cache_dir) if self.config.data.cache_dir else self.dir.parent / "cache"

    @cached_property
    def documents(self):
        found = open_documents(self.config.data, self.cache_dir)
        for note in found.notes:
            self.log.say(note)
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.dir / "tokenizer")

    @cached_property
    def gpt_config(self) -> GPTConfig:
        return scaling.gpt_config(self.config.model, self.tokenizer.vocab_size)

    @cached_property
    def dtype(self):
        """For evaluation and sampling."""
        return devices.compute_dtype(self.config.dtype)

    @cached_property
    def training_dtype(self):
        return devices.training_dtype(self.config.dtype)

    @cached_property
    def mesh(self):
        return sharding.make_mesh(self.config.mesh)

    def packed(self, split: str, rows: int | None = None) -> PackedDataset:
        """The packed rows of the documents' train or val split, `rows` of them at most. Close it: packing may
        still run."""
        return pack_split(
            self.config, self.documents, self.tokenizer, self.cache_dir, split, rows=rows, log=self.log.say
        )

    def params_of(self, stage: str) -> dict:
        return checkpoint.load_model(self.dir, stage).params

"""Checkpoints by Orbax: asynchronous, atomic, with checksums, restored bit for bit onto any mesh."""

from nanochat_jax.checkpoint.manager import Checkpointer, saved_steps  # noqa: F401
from nanochat_jax.checkpoint.models import Loaded, adapters_of, load_changed, load_model, read_done, write_done  # noqa: F401
from nanochat_jax.checkpoint.store import Damaged  # noqa: F401

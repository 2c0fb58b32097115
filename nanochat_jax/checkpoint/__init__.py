"""Checkpoints by Orbax: asynchronous, atomic, with checksums, restored bit for bit onto any mesh.

store.py      what a checkpoint folder holds, and how damage to it is found
manager.py    a stage's checkpoints: saved, kept, restored, on one host or several
models.py     loads a trained model from a run directory; the mark of a finished stage
__main__.py   python -m nanochat_jax.checkpoint ls|show|verify DIR
"""

from nanochat_jax.checkpoint.manager import Checkpointer, saved_steps
from nanochat_jax.checkpoint.models import STAGES, Loaded, adapters_of, load_changed, load_model, read_done, write_done
from nanochat_jax.checkpoint.store import Damaged

__all__ = [
    "STAGES",
    "Checkpointer",
    "Damaged",
    "Loaded",
    "adapters_of",
    "load_changed",
    "load_model",
    "read_done",
    "saved_steps",
    "write_done",
]

"""What a training step keeps of each layer for the backward pass, and what it computes again there.

    none    all that the backward pass reads
    block   what enters the layer, q, k and v, attention's result and its projection; norms, rotations and the MLP's
            hidden layer are computed again
    full    what enters the layer

Chen et al. 2016, arXiv 1604.06174.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.config import GPTConfig

LEVELS = ("none", "block", "full")  # each needs less memory, and more products, than the one before
ATTENTION = "attention"  # the name of what attention's backward pass reads
_KEPT = jax.checkpoint_policies.save_only_these_names("qkv", ATTENTION, "attended")

named = checkpoint_name


def levels(setting: str) -> tuple[str, ...]:
    """The levels that a run's setting allows, those with fewer products first."""
    return LEVELS if setting == "auto" else (setting,)


def _keeps_block(primitive, *args, **params) -> bool:
    # cuDNN's results cannot be named: they are made within jax
    return "dot_product_attention_fwd" in primitive.name or bool(_KEPT(primitive, *args, **params))


def layer(f: Callable, level: str) -> Callable:
    """f, a layer's function of arrays, as one that keeps what `level` says."""
    return f if level == "none" else jax.checkpoint(f, policy=_keeps_block if level == "block" else None)


def again(cfg: GPTConfig, level: str) -> int:
    """FLOPs of the matrix products, attention's included, that are computed again for each token."""
    D, kv = cfg.n_embd, cfg.n_kv_head * cfg.head_dim
    hidden, before = 2 * 4 * D * D, 2 * D * (D + 2 * kv) + 2 * D * D
    attention = sum(4 * min(w, cfg.sequence_len) * D for w in cfg.windows)
    return {"none": 0, "block": cfg.n_layer * hidden, "full": cfg.n_layer * (hidden + before) + attention}[level]

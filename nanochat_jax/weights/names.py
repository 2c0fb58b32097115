"""Parameter names of other code bases: karpathy/nanochat's for `modern`, transformers' `nanochat` for `classic`.

Both store weights (out, in), as we do, so that only names have to be translated.
"""

from collections.abc import Mapping

import jax
import numpy as np

from nanochat_jax.config import GPTConfig

# a part of our parameter's path -> theirs; the others stay, joined by dots
_RENAMED = {
    "modern": {
        **{"embedding": "weight", "wte": "transformer.wte", "blocks": "transformer.h"},
        **{"q": "c_q", "k": "c_k", "v": "c_v", "proj": "c_proj", "fc": "c_fc"},
        **{"resid_scalars": "resid_lambdas", "x0_scalars": "x0_lambdas"},
    },
    "classic": {
        **{"embedding": "weight", "wte": "model.embed_tokens", "blocks": "model.layers", "attn": "self_attn"},
        **{"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj", "fc": "fc1"},
    },
}
TABLES = ("wte", "lm_head", "value_embeds")  # of a row for every token


def reference_name(path, arch: str) -> str:
    """Their name of our parameter at a pytree path: blocks/0/attn/q/weight is transformer.h.0.attn.c_q.weight."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return ".".join(_RENAMED[arch].get(part, part) for part in parts).replace("mlp.o_proj", "mlp.fc2")


def to_reference(params: Mapping, cfg: GPTConfig) -> dict[str, np.ndarray]:
    """Our parameters (a nested dict) under their names; transformers' tables go without padding."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    out = {reference_name(path, cfg.init): np.asarray(array) for path, array in leaves}
    if cfg.init == "classic":
        out |= {name: out[name][: cfg.vocab_size] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return out


def from_reference(
    tensors: Mapping[str, np.ndarray], template: Mapping, cfg: GPTConfig, naming: str | None = None
) -> dict:
    """Their tensors in the nesting, and the types, of `template`, our parameters of the same sizes.

    naming: "modern" or "classic", whose names they have; None: those of cfg's own architecture. Rows of a table for
    ids beyond the vocabulary are cut off or, zeros, added. Raises KeyError for a name that is missing and ValueError
    for a shape that differs or a tensor that has no place here.
    """
    left = set(tensors)

    def taken(path, leaf) -> np.ndarray:
        name = reference_name(path, naming or cfg.init)
        array = np.asarray(tensors[name]).astype(leaf.dtype)
        left.discard(name)
        if path[0].key in TABLES and len(array) >= cfg.vocab_size:
            array = np.pad(array[: len(leaf)], ((0, max(0, len(leaf) - len(array))), (0, 0)))
        if array.shape != leaf.shape:
            raise ValueError(f"{name} has shape {array.shape} and not {leaf.shape}")
        return array

    out = jax.tree_util.tree_map_with_path(taken, template)
    if left:
        raise ValueError(f"they hold {min(left)}")
    return out

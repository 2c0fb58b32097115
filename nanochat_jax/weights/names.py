"""Parameter names of other code bases: karpathy/nanochat's for `modern`, transformers' `nanochat` for `classic`.

Both store weights (out, in), as we do, so that names are all there is to translate.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nanochat_jax.config import GPTConfig

Path = tuple[str, ...]

_MODERN = {"q": "c_q", "k": "c_k", "v": "c_v", "proj": "c_proj", "ve_gate": "ve_gate", "fc": "c_fc"}
_CLASSIC = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}
_CLASSIC_MLP = {"fc": "fc1", "proj": "fc2"}
TABLES = ("wte", "lm_head", "value_embeds")  # of a row for every token


def reference_name(path: Path, arch: str) -> str:
    """The other side's name of our parameter at `path`, e.g. blocks/0/attn/q/weight."""
    modern = arch == "modern"
    match path:
        case ("wte", _):
            return "transformer.wte.weight" if modern else "model.embed_tokens.weight"
        case ("blocks", layer, part, name, _) if modern:
            return f"transformer.h.{layer}.{part}.{_MODERN[name]}.weight"
        case ("blocks", layer, "attn", name, _):
            return f"model.layers.{layer}.self_attn.{_CLASSIC[name]}.weight"
        case ("blocks", layer, "mlp", name, _):
            return f"model.layers.{layer}.mlp.{_CLASSIC_MLP[name]}.weight"
        case ("value_embeds", layer, _):
            return f"value_embeds.{layer}.weight"
        case ("lm_head" | "smear_gate" as name, _):
            return f"{name}.weight"
        case ("resid_scalars",):
            return "resid_lambdas"
        case ("x0_scalars",):
            return "x0_lambdas"
        case (name,):
            return name
    raise KeyError("/".join(path))


def flatten(params: Mapping, prefix: Path = ()) -> dict[Path, object]:
    """A nested dict as {path: leaf}; keys become text."""
    out: dict[Path, object] = {}
    for key, value in params.items():
        path = (*prefix, str(key))
        out.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return out


def to_reference(params: Mapping, cfg: GPTConfig) -> dict[str, np.ndarray]:
    """Our parameters (a nested dict) under the other side's names; transformers' tables go without padding."""
    out = {reference_name(path, cfg.init): np.asarray(array) for path, array in flatten(params).items()}
    if cfg.init == "classic":
        out |= {name: out[name][: cfg.vocab_size] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return out


def from_reference(
    tensors: Mapping[str, np.ndarray],
    template: Mapping,
    cfg: GPTConfig,
    prefix: Path = (),
    naming: str | None = None,
) -> dict:
    """The other side's tensors in the nesting, and the types, of `template`, our parameters of the same sizes.

    naming: "modern" or "classic", whose names they have; None: those of cfg's own architecture. Rows of a table for
    ids beyond the vocabulary are cut off or, zeros, added. Raises KeyError for a name that is missing and ValueError
    for a shape that differs.
    """
    out = {}
    for key, leaf in template.items():
        path = (*prefix, str(key))
        if isinstance(leaf, Mapping):
            out[key] = from_reference(tensors, leaf, cfg, path, naming)
            continue
        name = reference_name(path, naming or cfg.init)
        array = np.asarray(tensors[name]).astype(leaf.dtype)
        if path[0] in TABLES and len(array) >= cfg.vocab_size:
            array = np.pad(array[: len(leaf)], ((0, max(0, len(leaf) - len(array))), (0, 0)))
        if array.shape != leaf.shape:
            raise ValueError(f"{name} has shape {array.shape} and not {leaf.shape}")
        out[key] = array
    return out

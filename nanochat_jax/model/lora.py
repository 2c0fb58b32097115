"""LoRA: a checkpoint fine-tuned by low-rank changes of its matrices (Hu et al., arXiv 2106.09685).

Every matrix W (out, in) of the blocks' attention and MLP becomes W + 2 b a, with a (rank, in) and b (out, rank): alpha
is twice the rank. W is frozen, in the dtype of the products. Only a and b have float32 masters, gradients and moments,
and only they are saved in a checkpoint.
"""

import math

import jax
import jax.numpy as jnp

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.gpt import init_params

SCALE = 2.0  # alpha / rank
BETAS = (0.9, 0.95)  # of AdamW
MATRICES = {"attn": ("q", "k", "v", "proj"), "mlp": ("fc", "proj")}  # of a block


def init(cfg: GPTConfig, rank: int, seed: int) -> dict:
    """Fresh adapters: a is normal with variance 1 / in, b zero. Nested as the parameters are:
    {"blocks": {layer: {"attn": {"q": {"a", "b"}, ...}, "mlp": ...}}}, float32."""
    blocks = jax.eval_shape(lambda: init_params(cfg, 0))["blocks"]
    shapes = {
        layer: {part: {name: block[part][name]["weight"].shape for name in names} for part, names in MATRICES.items()}
        for layer, block in blocks.items()
    }

    def adapter(key, shape) -> dict:
        out, inner = shape
        a = jax.random.normal(key, (rank, inner), jnp.float32) / math.sqrt(inner)
        return {"a": a, "b": jnp.zeros((out, rank), jnp.float32)}

    leaves, tree = jax.tree.flatten({"blocks": shapes}, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(tree, map(adapter, jax.random.split(jax.random.key(seed), len(leaves)), leaves))


def state_bytes(cfg: GPTConfig, rank: int) -> int:
    """Adapters and their two moments, in float32."""
    return 12 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(cfg, rank, 0))))


def merged(params: dict, adapters: dict) -> dict:
    """The parameters with every adapted W as W + 2 b a, in W's dtype; the others are the very same arrays."""
    if "a" in adapters:
        weight = params["weight"]
        change = adapters["b"].astype(weight.dtype) @ adapters["a"].astype(weight.dtype)
        return {**params, "weight": weight + SCALE * change}
    return {**params, **{name: merged(params[name], inner) for name, inner in adapters.items()}}

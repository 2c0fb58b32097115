"""The architecture as others write it: transformers' config.json of `nanochat`, karpathy/nanochat's `model_config`.

What our settings cannot express is refused by name, so that no model comes in as another one.
"""

from collections.abc import Collection

from nanochat_jax.config import GPTConfig, ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.model.scaling import gpt_config

# our sizes, which the reference names as we do -> transformers' names
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "sequence_len": "max_position_embeddings",
}
CLASSIC = gpt_config(ModelConfig(arch="classic"), 0)  # for its constants
# what config.json must say, and what it means where it says nothing
FIXED = {
    "hidden_act": "relu2",
    "rms_norm_eps": CLASSIC.norm_eps,
    "final_logit_softcapping": CLASSIC.softcap,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def _known_elsewhere(cfg: GPTConfig) -> None:
    for name in ("bigram_rows", "key_offset", "head_values"):
        if value := getattr(cfg, name):
            raise UserError(f"model.{name}={str(value).lower()}: no format that is exported has this")


def transformers_config(cfg: GPTConfig) -> dict:
    """The config.json of a `classic` model, without the ids of special tokens. UserError where it has windows."""
    _known_elsewhere(cfg)
    if any(window < cfg.sequence_len for window in cfg.windows):
        pattern = f"model.window_pattern={cfg.window_pattern}"
        raise UserError(f"{pattern}: transformers' `nanochat` attends to the whole context")
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "intermediate_size": 4 * cfg.n_embd,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_base},
        **FIXED,
    }


def reference_config(cfg: GPTConfig) -> dict:
    """The config.json of a `modern` model; `model_config` is what the reference's GPTConfig takes."""
    _known_elsewhere(cfg)
    return {
        "architectures": ["GPT"],
        "model_type": "nanochat-modern",
        "model_config": {key: getattr(cfg, key) for key in (*SIZES, "window_pattern")},
    }


def from_transformers(config: dict) -> tuple[ModelConfig, int]:
    """(our settings, vocabulary) of a config.json of model type `nanochat`. UserError for what they cannot say."""
    fixed = {**FIXED, "rope_theta": CLASSIC.rope_base, "rope_type": "default"}
    said = {**fixed, **config, **(config.get("rope_parameters") or {})}
    for key, value in {**fixed, "intermediate_size": 4 * config["hidden_size"]}.items():
        if said.get(key) != value:
            raise UserError(f"config.json has {key}={said.get(key)}; this project's classic architecture has {value}")
    config = {"num_key_value_heads": config["num_attention_heads"], **config}
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    return from_reference_config({**sizes, "window_pattern": None}, ())


def from_reference_config(config: dict, names: Collection[str]) -> tuple[ModelConfig, int]:
    """(our settings, vocabulary) of the reference's `model_config`; names: the arrays', which tell its versions apart.

    UserError for those between October 2025 and what is `modern` here.
    """
    parts = ("value_embeds.", "resid_lambdas", "x0_lambdas", "smear_", "backout_lambda")
    has = [any(name.startswith(part) for name in names) for part in parts]
    if any(has) and not all(has):
        raise UserError(
            "these weights are of a version of nanochat between the two that this project has: the one of October 2025 "
            "(classic) and the one with smear and backout (modern)"
        )
    model = ModelConfig(
        arch="modern" if all(has) else "classic",
        depth=config["n_layer"],
        width=config["n_embd"],
        head_dim=config["n_embd"] // config["n_head"],
        n_kv_head=config["n_kv_head"],
        sequence_len=config["sequence_len"],
        window_pattern=config.get("window_pattern", "L"),
    )
    return model, config["vocab_size"]

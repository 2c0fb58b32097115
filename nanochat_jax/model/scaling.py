"""One dial, depth: from it the width, parameters, FLOPs, tokens, batch, steps, rates and decay of a run.

Plain arithmetic, no arrays. The rules are those of karpathy/nanochat: batch by Power Lines (arXiv 2505.13738), decay by
the constant-epoch rule of Wang and Aitchison (arXiv 2405.13698), both relative to depth 12.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nanochat_jax.config import GPTConfig, ModelConfig, RunConfig

REFERENCE_DEPTH = 12  # where the rates were tuned
REFERENCE_BATCH = 2**19  # tokens
REFERENCE_WIDTH = 768
REFERENCE_DECAY = 0.28
GATE_CHANNELS, SMEAR_CHANNELS = 12, 24  # inputs of the value-embedding gate and of the smear gate


def gpt_config(cfg: ModelConfig, vocab_size: int) -> GPTConfig:
    """The architecture of a depth: width 64 per layer, rounded up to whole heads."""
    width = cfg.width or -(-64 * cfg.depth // cfg.head_dim) * cfg.head_dim
    heads = width // cfg.head_dim
    modern = GPTConfig(
        vocab_size=vocab_size,
        n_layer=cfg.depth,
        n_head=heads,
        n_kv_head=cfg.n_kv_head or heads,
        n_embd=width,
        sequence_len=cfg.sequence_len,
        window_pattern=cfg.window_pattern or ("L" if cfg.arch == "classic" else "SSSL"),
        bigram_rows=cfg.bigram_rows,
        key_offset=cfg.key_offset,
        head_values=cfg.head_values,
    )
    if cfg.arch != "classic":
        return modern
    without: dict[str, Any] = dict.fromkeys(("residual_scalars", "value_embeds", "smear", "backout"), False)
    return dataclasses.replace(modern, init="classic", rope_base=10_000.0, qk_gain=1.0, norm_eps=1e-6, **without)


def param_counts(cfg: GPTConfig) -> dict[str, int]:
    """Parameters by group, the vocabulary's padding included; `total` is their sum."""
    D, L, kv = cfg.n_embd, cfg.n_layer, cfg.n_kv_head * cfg.head_dim
    gates = sum(cfg.has_value_embed(i) for i in range(L))
    tables = sum(cfg.has_value_table(i) for i in range(L))
    counts = {
        "wte": cfg.padded_vocab * D,
        "value_embeds": tables * cfg.padded_vocab * kv,
        "lm_head": cfg.padded_vocab * D,
        "transformer_matrices": L * (2 * D * D + 2 * D * kv + 8 * D * D) + gates * GATE_CHANNELS * cfg.n_kv_head,
        "scalars": 2 * L * cfg.residual_scalars + (SMEAR_CHANNELS + 1) * cfg.smear + cfg.backout,
    }
    if cfg.bigram_rows:
        counts["bigrams"] = cfg.bigram_rows * D
    return {**counts, "total": sum(counts.values())}


def matmul_params(cfg: GPTConfig) -> int:
    """Parameters that every token is multiplied by: two FLOPs each in the forward pass."""
    counts = param_counts(cfg)
    return counts["transformer_matrices"] + counts["lm_head"] + SMEAR_CHANNELS * cfg.smear


def flops_per_token(cfg: GPTConfig, vocab_sample: int | None = None) -> int:
    """Training FLOPs per token: 6 per matmul parameter, 12 D per layer and key in reach (PaLM, arXiv 2204.02311).
    vocab_sample: entries that stand for the vocabulary in the loss."""
    spared = max(cfg.padded_vocab - vocab_sample, 0) * cfg.n_embd if vocab_sample else 0
    return 6 * (matmul_params(cfg) - spared) + sum(12 * cfg.n_embd * min(w, cfg.sequence_len) for w in cfg.windows)


def kv_bytes_per_token(cfg: GPTConfig, itemsize: int) -> int:
    """Bytes that one token takes in the cache, over all layers."""
    return cfg.n_layer * 2 * cfg.n_kv_head * cfg.head_dim * itemsize


def scaling_params(cfg: GPTConfig) -> int:
    """The parameters in the ratio of tokens to parameters: block matrices and the head, which fit scaling laws best."""
    counts = param_counts(cfg)
    return counts["transformer_matrices"] + counts["lm_head"]


@dataclass(frozen=True)
class Plan:
    target_tokens: int
    batch_tokens: int
    steps: int
    lr_scale: float  # b: (batch / 2^19)^batch_power, multiplies every rate but the smear's
    adamw_lr_scale: float  # d: (width / 768)^-0.5, multiplies the rates of tables and head
    weight_decay: float  # of Muon's matrices, at the first step

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens


def base_plan(gpt: GPTConfig, config: RunConfig) -> Plan:
    base = config.base
    return plan(
        gpt,
        ratio=base.ratio,
        tokens=base.tokens,
        batch_tokens=base.batch_tokens,
        batch_power=base.optim.batch_power,
        head_dim=config.model.head_dim,
    )


def plan(
    cfg: GPTConfig,
    *,
    ratio: float = 12.0,
    tokens: int | None = None,
    batch_tokens: int | None = None,
    reference_decay: float = REFERENCE_DECAY,
    batch_power: float = 0.5,
    head_dim: int = 128,
) -> Plan:
    """Tokens, batch, steps and scales for an architecture at `ratio` tokens per parameter; tokens and batch override.

    `classic` counts all parameters, keeps the batch at 2^19 and decays nothing.
    """
    classic = cfg.init == "classic"
    counted = param_counts(cfg)["total"] if classic else scaling_params(cfg)
    target = tokens or int(ratio * counted)
    reference_model = ModelConfig(depth=REFERENCE_DEPTH, head_dim=head_dim, sequence_len=cfg.sequence_len)
    twelve = gpt_config(reference_model, cfg.vocab_size)
    reference = ratio * scaling_params(dataclasses.replace(twelve, vocab_multiple=cfg.vocab_multiple))
    batch = batch_tokens
    if batch is None:
        batch = REFERENCE_BATCH if classic else 2 ** round(math.log2(REFERENCE_BATCH * (target / reference) ** 0.383))
    share = batch / REFERENCE_BATCH
    lr_scale = 1.0 if classic else share**batch_power
    return Plan(
        target_tokens=target,
        batch_tokens=batch,
        steps=max(1, target // batch),
        lr_scale=lr_scale,
        adamw_lr_scale=(cfg.n_embd / REFERENCE_WIDTH) ** -0.5,
        # rate times decay times steps: the same for every run
        weight_decay=0.0 if classic else reference_decay * share / lr_scale * reference / target,
    )

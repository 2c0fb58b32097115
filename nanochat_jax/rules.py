"""What must hold of settings beyond their types: sizes that cannot be, choices, combinations."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_jax.errors import UserError

_CHOICES = {
    "model.arch": ("modern", "classic"),
    "data.source": ("auto", "embedded", "local", "hub"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "cudnn", "flash", "blocks"),
    "rl.objective": ("grpo", "dpo"),
    "evals.sandbox": ("auto", "required"),
}
_COUNTS = (
    "model.depth model.sequence_len model.head_dim base.micro_batch mid.micro_batch sft.micro_batch rl.micro_batch "
    "rl.questions rl.samples rl.epochs rl.minibatches evals.batch checkpoints.keep"
)
_WHOLE = "needs rl.top_k=0, not {0.rl.top_k}: probabilities that it compares are of all tokens, so samples must be too"
# (settings, what must hold for the value of each in a RunConfig, what is said after `name=value` where it does not).
# None is always allowed; {0} in a message is the configuration.
_RULES: tuple[tuple[str, Callable[[Any, Any], object], str], ...] = (
    *((name, lambda v, c, of=of: v in of, f"is not one of {', '.join(of)}") for name, of in _CHOICES.items()),
    (_COUNTS, lambda v, c: v >= 1, "must be at least 1"),
    ("checkpoints.save_minutes", lambda v, c: v > 0, "must be more than 0; leave it out for none"),
    ("checkpoints.keep_every_hours", lambda v, c: v > 0, "must be more than 0; leave it out for none"),
    ("tracking.samples", lambda v, c: v >= 0, "must not be negative; 0 takes none"),
    ("model.head_dim", lambda v, c: v % 2 == 0, "must be even: rotary embeddings rotate pairs"),
    ("model.width", lambda v, c: v >= 24, "is too small; take 24 or more: the smear's gate looks at 24 channels"),
    ("model.width", lambda v, c: v % c.model.head_dim == 0, "must be a multiple of model.head_dim={0.model.head_dim}"),
    ("model.sequence_len", lambda v, c: v >= 16, "is too short for a conversation; take 16 or more"),
    ("model.window_pattern", lambda v, c: v and set(v) <= set("SL"), "may hold only the letters S and L"),
    ("rl.questions", lambda v, c: v % c.rl.minibatches == 0, "must be a multiple of rl.minibatches={0.rl.minibatches}"),
    ("rl.kl", lambda v, c: v >= 0, "must not be negative"),
    ("rl.clip", lambda v, c: 0 < v < 1, "must lie between 0 and 1, such as 0.2; leave it out for no clipping"),
    ("rl.clip_high", lambda v, c: c.rl.clip and v >= c.rl.clip, "must be at least rl.clip, which is {0.rl.clip}"),
    ("rl.kl rl.clip", lambda v, c: not c.rl.top_k or c.rl.objective == "dpo", _WHOLE),
    ("rl.epochs rl.minibatches", lambda v, c: v == 1 or not c.rl.top_k or c.rl.objective == "dpo", _WHOLE),
    ("rl.temperature", lambda v, c: v >= 0.25, "must be at least 0.25: colder, exponentials leave the range of floats"),
    (
        "rl.kl rl.clip rl.zscore",
        lambda v, c: not v or c.rl.objective != "dpo",
        "must be left out with rl.objective=dpo",
    ),
    (
        "rl.task",
        lambda v, c: isinstance(v, str) or min(v.values(), default=0) >= 1,
        "needs a name, and shares of 1 or more",
    ),
    ("evals.samples", lambda v, c: v >= 0, "must not be negative; 0 draws none"),
    ("evals.temperature", lambda v, c: v > 0, "must be more than 0: greedy answers are all alike"),
    ("tokenizer.vocab_size", lambda v, c: v >= 512, "is too small: bytes and the text's characters need 512 or more"),
    ("tokenizer.vocab_size", lambda v, c: v <= 65536, "does not fit 16 bits; take 65536 or less"),
    ("data.source", lambda v, c: v != "local" or c.data.dir, "needs data.dir=<folder>"),
    ("data.dir", lambda v, c: not v or Path(v).is_dir(), "is not a folder; leave it out for the embedded data"),
    (
        "base.batch_tokens mid.batch_tokens sft.batch_tokens",
        lambda v, c: v % c.model.sequence_len == 0,
        "must be a multiple of model.sequence_len={0.model.sequence_len}",
    ),
    ("mid.lora_rank sft.lora_rank", lambda v, c: v >= 1, "must be at least 1; leave it out to train everything"),
)


def check(config: Any) -> None:
    """UserError for the first setting of a RunConfig that breaks a rule."""
    for names, holds, message in _RULES:
        for name in names.split():
            value = operator.attrgetter(name)(config)
            if value is not None and not holds(value, config):
                raise UserError(f"{name}={value} {message.format(config)}")

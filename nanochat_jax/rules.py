"""What must hold of settings: bounds and choices, which stand beside the fields in config.py, and combinations."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from nanochat_jax.errors import UserError

STAGES = ("base", "mid", "sft", "rl")  # those that train a model, in order


@dataclass(frozen=True)
class Among:
    choices: tuple[str, ...]

    def refusal(self, value: str) -> str | None:
        return None if value in self.choices else f"is not one of {', '.join(self.choices)}"


@dataclass(frozen=True)
class Bounds:
    """A setting's value is a number, at least `least`, more than `above`, at most `most`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def refusal(self, value: float) -> str | None:
        if not math.isfinite(value):
            return "must be a finite number"
        if self.least is not None and value < self.least:
            return "must not be negative" if self.least == 0 else f"must be at least {self.least:g}"
        if self.above is not None and value <= self.above:
            return f"must be more than {self.above:g}"
        return f"must be at most {self.most}" if self.most is not None and value > self.most else None


# The types of settings with bounds, and with choices
Count = Annotated[int, Bounds(least=1)]
Natural = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
Rate = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
Seed = Annotated[int, Bounds(least=0, most=2**63 - 1)]
Arch = Annotated[str, Among(("modern", "classic", "next"))]
Source = Annotated[str, Among(("auto", "embedded", "local", "hub"))]
Dtype = Annotated[str, Among(("auto", "float32", "bfloat16"))]
Matrices = Annotated[str, Among(("muon", "adamw"))]
Backend = Annotated[str, Among(("auto", "cudnn", "flash", "blocks"))]
OptimizerState = Annotated[str, Among(("float32", "light"))]
Remat = Annotated[str, Among(("auto", "none", "block", "full"))]
Objective = Annotated[str, Among(("grpo", "dpo"))]
Sandbox = Annotated[str, Among(("auto", "required"))]
Stage = Annotated[str, Among(STAGES)]

_WHOLE = "needs rl.top_k=0, not {0.rl.top_k}: probabilities that it compares are of all tokens, so samples must be too"
# (settings, what must hold for the value of each in a RunConfig, what is said after `name=value` where it does not).
# None is always allowed; {0} in a message is the configuration.
_RULES: tuple[tuple[str, Callable[[Any, Any], object], str], ...] = (
    ("mesh.data mesh.fsdp mesh.tensor", lambda v, c: v == -1 or v >= 1, "must be at least 1, or -1 for what is left"),
    ("model.head_dim", lambda v, c: v % 2 == 0, "must be even: rotary embeddings rotate pairs"),
    ("model.width", lambda v, c: v >= 24, "is too small; take 24 or more: the smear's gate looks at 24 channels"),
    ("model.width", lambda v, c: v % c.model.head_dim == 0, "must be a multiple of model.head_dim={0.model.head_dim}"),
    ("model.n_kv_head", lambda v, c: _heads(c.model) % v == 0, "must divide the number of heads"),
    ("model.sequence_len", lambda v, c: v >= 16, "is too short for a conversation; take 16 or more"),
    ("model.window_pattern", lambda v, c: v and set(v) <= set("SL"), "may hold only the letters S and L"),
    ("rl.questions", lambda v, c: v % c.rl.minibatches == 0, "must be a multiple of rl.minibatches={0.rl.minibatches}"),
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
    ("tokenizer.vocab_size", lambda v, c: v >= 512, "is too small: bytes and the text's characters need 512 or more"),
    ("tokenizer.vocab_size", lambda v, c: v <= 65536, "does not fit 16 bits; take 65536 or less"),
    ("data.source", lambda v, c: v != "local" or c.data.dir, "needs data.dir=<folder>"),
    ("data.dir", lambda v, c: not v or Path(v).is_dir(), "is not a folder; leave it out for the embedded data"),
    (
        "base.vocab_sample",
        lambda v, c: 2 <= v < c.tokenizer.vocab_size,
        "must be 2 or more and less than tokenizer.vocab_size={0.tokenizer.vocab_size}",
    ),
    (
        "base.optim.batch_power mid.optim.batch_power sft.optim.batch_power rl.optim.batch_power",
        lambda v, c: v == 0.5 or c.model.arch != "classic",
        "must be left out with model.arch=classic, whose rates are the same for every batch",
    ),
    (
        "base.batch_tokens mid.batch_tokens sft.batch_tokens",
        lambda v, c: v % c.model.sequence_len == 0,
        "must be a multiple of model.sequence_len={0.model.sequence_len}",
    ),
)


def _heads(model: Any) -> int:
    return -(-(model.width or 64 * model.depth) // model.head_dim)


def check_together(config: Any) -> None:
    """UserError for the first setting of a RunConfig that does not go with the others."""
    for names, holds, message in _RULES:
        for name in names.split():
            value = operator.attrgetter(name)(config)
            if value is not None and not holds(value, config):
                raise UserError(f"{name}={value} {message.format(config)}")

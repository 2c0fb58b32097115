"""What mid and sft learn from, by the source of the data: (task, split, times) as `data.mixture.Mixture` takes them.

times > 0 repeats all rows, times < 0 takes so many of them. Tasks that a source lacks are left out.
"""

from evals.tasks import trainable
from nanochat_jax.config import DataConfig
from nanochat_jax.data.sources import source_of
from nanochat_jax.errors import UserError

USUAL = {
    "mid": dict(chat=1, mmlu=1, gsm8k=1, identity=-1_000, spellingbee=-20_000, spelling=-20_000),
    "sft": dict(arc_easy=1, arc_challenge=1, gsm8k=1, chat=-10_000, identity=-1_000, spellingbee=-300, spelling=-300),
}
# Without a network, both learn from conversations of all kinds, other ones each, and keep a part of the text of base.
EMBEDDED = {
    "mid": dict(talk=-42_000, text=-2_400, story=-5_000, reading=-5_000, tools=-26_000, thinking=-5_000),
    "sft": dict(talk=-42_000, text=-4_000, story=-5_000, tools=-18_000, thinking=-5_000),
}


def mixture(stage: str, data: DataConfig, override: dict[str, int] | None = None) -> list[tuple[str, str, int]]:
    """Of mid or sft. UserError where an override names a task that has no training rows in this source."""
    at_hand = trainable(data)
    for name, times in (override or {}).items():
        if name not in at_hand:
            raise UserError(f"mixture names {name}, which has no training rows here; at hand: {', '.join(at_hand)}")
        if times == 0:
            raise UserError(f"mixture.{name}=0 means nothing: leave it out, or give repeats (1) or rows (-100)")
    usual = (EMBEDDED if source_of(data) == "embedded" else USUAL)[stage]
    chosen = usual if override is None else override
    return [(name, "train", times) for name, times in chosen.items() if name in at_hand]

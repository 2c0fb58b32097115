"""Curves over training steps: loss, bits per byte, CORE, reward, what RL does to the policy, throughput."""

import statistics
from collections.abc import Sequence

from evals.report.facts import Facts
from evals.report.plots import STAGE_COLOURS, Panel, Series, draw
from nanochat_jax.rules import STAGES

# of RL's records: (name, title, unit)
POLICY = (
    ("completion_tokens", "length of answers", "tokens"),
    ("truncated", "answers cut off", "share that met the limit"),
    ("entropy", "entropy", "nats per token"),
    ("kl", "KL to its first model", "nats per token"),
    ("clip_fraction", "clipped tokens", "share"),
    ("preferred", "right answer preferred", "share of pairs"),
    ("margin", "margin of the right answer", "nats"),
)


def points(records: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]


def sampled_share(facts: Facts, stage: str, record: dict) -> float:
    """The part of a step's budget of tokens that were there: 1 but in RL, where answers end before the limit."""
    if stage != "rl" or "completion_tokens" not in record:
        return 1.0
    return record["completion_tokens"] / facts.config.rl.max_new_tokens


def rates(facts: Facts, stage: str) -> tuple[list[int], list[float]]:
    """Steps and tokens/s of a stage, without the first step of all, which compiles."""
    found = [r for r in facts.metrics[stage] if r.get("tokens_per_second")][1:]
    return [r["step"] for r in found], [r["tokens_per_second"] * sampled_share(facts, stage, r) for r in found]


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def mfu(facts: Facts, stage: str) -> float | None:
    """The median share of the devices' peak. None where the peak is unknown, and of RL, which samples as well."""
    return None if stage == "rl" else median(points(facts.metrics[stage], "mfu")[1][1:])


def section(facts: Facts) -> str:
    images, rl = [], facts.metrics["rl"]

    def add(name: str, title: str, panels: list[Panel], **how) -> None:
        if panels := [p for p in panels if any(len(s.x) > 1 for s in p.series)]:
            draw(facts.dir / "report" / f"{name}.png", panels, **how)
            images.append(f"![{title}](report/{name}.png)")

    def of(stage: str, title: str, unit: str, key: str, smooth: bool = False, **how) -> Panel:
        return _one_line(stage, title, unit, points(facts.metrics[stage], key), smooth, **how)

    learned = ("base", "mid", "sft")
    add("loss", "Training loss", [of(s, "training loss", "nats per token", "loss", smooth=True) for s in learned])
    add("bpb", "Validation", [of(s, "validation", "bits per byte", "val_bpb") for s in learned], shared=True)
    add("core", "CORE while training", [of("base", "CORE while training", "mean centred accuracy", "core")])
    add("reward", "Reward of RL", _reward(rl))
    policy = [of("rl", title, unit, key, smooth=True, from_zero=True) for key, title, unit in POLICY]
    add("policy", "What RL does to the answers", policy)
    add("throughput", "Throughput", [_throughput(facts, s) for s in STAGES])
    return "\n\n".join(["## Curves", *images]) if images else ""


def _one_line(stage: str, title: str, unit: str, xy: tuple[list, list], smooth: bool, **how) -> Panel:
    return Panel(f"{stage}: {title}", unit, [Series("", *xy, smooth, not smooth)], STAGE_COLOURS[stage], **how)


def _reward(rl: list[dict]) -> list[Panel]:
    keys = dict.fromkeys(k for r in rl for k in r)
    rewarded = [k for k in keys if k == "reward" or k.endswith("/reward")]
    rewards = [Series("all" if k == "reward" else k.split("/")[0], *points(rl, k), smooth=True) for k in rewarded]
    ks = sorted((k for k in keys if k.startswith("pass@")), key=lambda k: int(k[5:]))
    passed = [Series(k, *points(rl, k), marks=True) for k in dict.fromkeys(ks[:1] + ks[-1:])]  # enough to see
    return [
        Panel("rl: reward while training", "mean reward", rewards, STAGE_COLOURS["rl"] if len(rewards) == 1 else None),
        Panel("rl: held-out questions", "share with a right answer", passed, share=True),
    ]


def _throughput(facts: Facts, stage: str) -> Panel:
    xy, share = rates(facts, stage), mfu(facts, stage)
    right = (100 * share / statistics.median(xy[1]), "MFU, %") if share and xy[1] else None
    title, unit = ("sampled tokens", "tokens/s sampled") if stage == "rl" else ("throughput", "tokens/s")
    return _one_line(stage, title, unit, xy, smooth=True, from_zero=True, right=right)

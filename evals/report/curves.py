"""Curves over training steps: loss, bits per byte, CORE, reward, what RL does to the policy, throughput."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from evals.report.facts import STAGES, Facts
from evals.report.plots import STAGE_COLOURS, Panel, Series, draw

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
    """Steps and values of the records that have a value for the key."""
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


def mfu(facts: Facts, stage: str) -> float | None:
    """The median share of the devices' peak. None where the peak is unknown, and of RL, which samples as well."""
    found = [r["mfu"] for r in facts.metrics[stage] if r.get("mfu") is not None][1:]
    return statistics.median(found) if found and stage != "rl" else None


def section(facts: Facts) -> str:
    images = []

    def add(name: str, title: str, panels: list[Panel], **how) -> None:
        panels = [p for p in panels if any(len(s.x) > 1 for s in p.series)]
        if panels:
            draw(facts.dir / "report" / f"{name}.png", panels, **how)
            images.append(f"![{title}](report/{name}.png)")

    def of_stages(stages: Sequence[str], title: str, unit: str, key: str, smooth: bool = False) -> list[Panel]:
        return [
            Panel(
                f"{s}: {title}",
                unit,
                [Series("", *points(facts.metrics[s], key), smooth, not smooth)],
                STAGE_COLOURS[s],
            )
            for s in stages
        ]

    learned = ("base", "mid", "sft")
    add("loss", "Training loss", of_stages(learned, "training loss", "nats per token", "loss", smooth=True))
    add("bpb", "Validation", of_stages(learned, "validation", "bits per byte", "val_bpb"), shared=True)
    add("core", "CORE while training", of_stages(["base"], "CORE while training", "mean centred accuracy", "core"))
    add("reward", "Reward of RL", _reward(facts.metrics["rl"]))
    add("policy", "What RL does to the answers", _policy(facts.metrics["rl"]))
    add("throughput", "Throughput", [_throughput(facts, s) for s in STAGES])
    return "\n\n".join(["## Curves", *images]) if images else ""


def _reward(rl: list[dict]) -> list[Panel]:
    names = dict.fromkeys(k for r in rl for k in r)
    rewards = [Series("all" if k == "reward" else k.split("/")[0], *points(rl, k), True)
               for k in names if k == "reward" or k.endswith("/reward")]  # fmt: skip
    passed = [Series(k, *points(rl, k), marks=True) for k in names if k.startswith("pass@")]
    passed.sort(key=lambda s: int(s.label[5:]))
    passed = passed[:1] + passed[1:][-1:]  # the first and the last are enough to see
    return [
        Panel("rl: reward while training", "mean reward", rewards, STAGE_COLOURS["rl"] if len(rewards) == 1 else None),
        Panel("rl: held-out questions", "share with a right answer", passed, share=True),
    ]


def _policy(rl: list[dict]) -> list[Panel]:
    return [
        Panel(f"rl: {title}", unit, [Series("", *points(rl, key), True)], STAGE_COLOURS["rl"], from_zero=True)
        for key, title, unit in POLICY
    ]


def _throughput(facts: Facts, stage: str) -> Panel:
    x, y = rates(facts, stage)
    share = mfu(facts, stage)
    right = (100 * share / statistics.median(y), "MFU, %") if share and y else None
    title, unit = ("sampled tokens", "tokens/s sampled") if stage == "rl" else ("throughput", "tokens/s")
    series = [Series("", x, y, smooth=True)]
    return Panel(f"{stage}: {title}", unit, series, STAGE_COLOURS[stage], from_zero=True, right=right)

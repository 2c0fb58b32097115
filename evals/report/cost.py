"""What each stage took: steps, tokens, hours of devices, dollars."""

from __future__ import annotations

import statistics

from evals.report import curves
from evals.report.facts import Facts
from nanochat_jax.words import DASH, count, duration, percent, table


def section(facts: Facts) -> str:
    ended = {stage: mark for stage, mark in facts.done.items() if mark}
    if not ended:
        return ""
    price, (unit, devices) = facts.config.price_per_hour, _devices(facts)
    columns = {"stage": list(ended), **_work(facts, ended)}
    seconds = [*(mark["seconds"] for mark in ended.values()), facts.seconds]
    spent = {"time": [duration(s) for s in seconds]}
    if devices:
        spent[f"{unit}-hours"] = [f"{devices * s / 3600:.2f}" for s in seconds]
    if price is not None:
        spent["cost"] = [f"${price * s / 3600:,.2f}" for s in seconds]
    rows = zip(*(column[: len(ended)] for column in (columns | spent).values()))
    last = ["**all**", *[""] * (len(columns) - 1), *(f"**{column[-1]}**" for column in spent.values())]
    text = table([*columns, *spent], [*rows, last])
    return f"## Time and cost\n\n{text}\n\n{' '.join(_remarks(facts, unit, devices))}"


def _devices(facts: Facts) -> tuple[str, int]:
    """(GPU or TPU, how many); 0 where it is a processor, or no stage has noted what it ran on."""
    system, noted = facts.system
    kind = system["devices"][0]
    if not noted or kind == "cpu":
        return "", 0
    return "TPU" if "tpu" in kind.lower() else "GPU", len(system["devices"])


def _work(facts: Facts, ended: dict[str, dict]) -> dict[str, list[str]]:
    """Columns of what the stages did; MFU where it is known of one at least."""
    shares = [curves.mfu(facts, stage) if stage in facts.metrics else None for stage in ended]
    out = {
        "steps": [f"{mark['steps']:,}" if mark.get("steps") else DASH for mark in ended.values()],
        "tokens": [count(_tokens(facts, stage, mark)) for stage, mark in ended.items()],
        "tokens/s": [count(_rate(facts, stage)) for stage in ended],
    }
    return out | ({"MFU": [percent(share) for share in shares]} if any(shares) else {})


def _tokens(facts: Facts, stage: str, mark: dict) -> float | None:
    tokens, records = mark.get("tokens"), [r for r in facts.metrics.get(stage, ()) if "loss" in r]
    if tokens and records:
        tokens *= statistics.mean(curves.sampled_share(facts, stage, r) for r in records)
    return tokens


def _rate(facts: Facts, stage: str) -> float | None:
    found = curves.rates(facts, stage)[1] if stage in facts.metrics else []
    return statistics.median(found) if found else None


def _remarks(facts: Facts, unit: str, devices: int) -> list[str]:
    price, out = facts.config.price_per_hour, []
    if price is None:
        out.append("No cost: `price_per_hour`, of the whole machine in dollars, is not set.")
    elif devices:
        out.append(f"The machine costs ${price:,.2f} an hour, ${price / devices:,.2f} a {unit}-hour.")
    else:
        out.append(f"The machine costs ${price:,.2f} an hour.")
    out.append("Rates are medians over the steps.")
    if facts.done["rl"]:
        out.append("Of rl it is the tokens that it sampled.")
    if not any(curves.mfu(facts, s) for s in facts.metrics):
        out.append("No MFU: it needs a device whose peak is known, such as a GPU.")
    if peak := facts.peak_memory_gb():
        out.append(f"The most memory that a process held: {peak:.1f} GB.")
    return out

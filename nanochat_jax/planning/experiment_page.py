"""What an experiment found, as experiment.md with its plot and experiment.json."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from evals.report import plots
from nanochat_jax.config import ExperimentConfig
from nanochat_jax.files import atomic_write_json, atomic_write_text
from nanochat_jax.planning.fit import LEVEL, Interval
from nanochat_jax.planning.multiplier import Multipliers, multipliers
from nanochat_jax.planning.runs import Run
from nanochat_jax.words import DASH, count, listed, table

PLOT = "experiment.png"
Runs = Mapping[int, Run]  # by the place of their seed


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant, or the base at one of its lengths."""

    name: str
    length: float
    bpb: float  # the mean over seeds
    error: float  # its standard error; NaN of one seed
    tokens: float
    tokens_per_second: float
    memory_gb: float
    seeds: int
    multipliers: Multipliers | None  # of variants whose seeds and the base's are two or more


def rows(found: Mapping[tuple[str, float], Runs], base: str) -> list[Row]:
    lengths = [runs for (name, _), runs in found.items() if name == base]
    out = []
    for (name, length), runs in found.items():
        if not runs:
            continue
        each = list(runs.values())
        together = [place for place in runs if all(place in of for of in lengths)]
        known = multipliers(lengths, runs) if name != base and len(together) > 1 else None
        bpb, tokens = _mean(each, "bpb"), _mean(each, "tokens")
        error = statistics.stdev(run.bpb for run in each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
        speed = statistics.median(run.tokens / run.seconds for run in each)
        out.append(Row(name, length, bpb, error, tokens, speed, max(r.memory_gb for r in each), len(each), known))
    return out


def write(
    out: Path, base: str, settings: ExperimentConfig, found: Mapping[tuple[str, float], Runs], failed: list[str]
) -> dict:
    """Writes the three files; returns what is said in one line: of each variant its bits per byte and multipliers."""
    every = rows(found, base)
    figures = {
        "settings": dataclasses.asdict(settings),
        "level": LEVEL,
        "rows": [_plain(dataclasses.asdict(row)) for row in every],
        "runs": {
            f"{name} x{length:g}": {place: dataclasses.asdict(run) for place, run in runs.items()}
            for (name, length), runs in found.items()
        },
        "failed": failed,
    }
    atomic_write_json(out / "experiment.json", figures)
    draw(out / PLOT, base, found)
    text = ["# Experiment", f"![Bits per byte by tokens and by seconds]({PLOT})", _table(every)]
    text += _notes(settings, every, failed, found)
    atomic_write_text(out / "experiment.md", "\n\n".join(text) + "\n")
    said = {}
    for row in every:
        if row.multipliers:
            said[row.name] = {"val_bpb": row.bpb, **_plain(dataclasses.asdict(row.multipliers))}
    return {"out": str(out), "failed": failed, "variants": said}


def _plain(value):
    """Without numbers that JSON has not: None in their place."""
    if isinstance(value, dict):
        return {key: _plain(of) for key, of in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(every: list[Row]) -> str:
    head = ("", "seeds", "bits per byte", "tokens", "tokens/s", "GB", "times the tokens", "times the seconds")
    body = []
    for row in every:
        name = row.name if row.length == 1 else f"{row.name}, {row.length:g} times the budget"
        bpb = f"{row.bpb:.4f} ± {row.error:.4f}" if row.seeds > 1 else f"{row.bpb:.4f}"
        sizes = (count(row.tokens), f"{row.tokens_per_second:,.0f}", f"{row.memory_gb:.2f}")
        known = row.multipliers
        beyond = " *" if known and known.beyond else ""
        gains = (_said(known.tokens) + beyond, _said(known.seconds) + beyond) if known else (DASH, DASH)
        body.append((name, f"{row.seeds}", bpb, *sizes, *gains))
    return table(head, body)


def _said(i: Interval) -> str:
    if math.isnan(i.value):
        return "not known: more training does not help the base"
    return f"{i.value:.3f} ({i.low:.3f} to {i.high:.3f})"


def _notes(
    settings: ExperimentConfig, every: list[Row], failed: list[str], found: Mapping[tuple[str, float], Runs]
) -> list[str]:
    changes = [f"- {name}: `{' '.join(changed) or 'nothing'}`" for name, changed in settings.variants.items()]
    notes = [
        "Multipliers: how many times the tokens, or the seconds, the base needs for a variant's bits per byte, with "
        f"{LEVEL:.0%} intervals over seeds. More than 1 is a gain; an interval that holds 1 shows neither gain nor "
        "loss. Seconds are those of the steps, at the median speed of each run."
    ]
    if any(row.multipliers and row.multipliers.beyond for row in every):
        notes.append("\\* beyond what the base's lengths reach: its curve is drawn on, straight.")
    codes: dict[str, dict[str, None]] = {}
    for (name, _), runs in found.items():
        for run in runs.values():
            codes.setdefault(run.code, {})[name] = None
    if len(codes) > 1:
        each = "; ".join(f"{code}: {listed([*names])}" for code, names in codes.items())
        notes.append(f"Not all runs are of the same code. By its hash, {each}.")
    if failed:
        notes.append(f"Failed, and left out: {listed(failed)}. Their log.txt says why.")
    return [*notes, *(["## Variants", "\n".join(changes)] if changes else [])]


def draw(path: Path, base: str, found: Mapping[tuple[str, float], Runs]) -> None:
    panels = []
    for title, label in (("By tokens", "tokens"), ("By time", "seconds")):
        clouds = []
        for name in dict.fromkeys(name for name, _ in found):
            lengths = [list(runs.values()) for (of, _), runs in sorted(found.items()) if of == name and runs]
            points = [(getattr(run, label), run.bpb) for runs in lengths for run in runs]
            means = [_mean(runs, label) for runs in lengths], [_mean(runs, "bpb") for runs in lengths]
            x, y = [p[0] for p in points], [p[1] for p in points]
            clouds.append(plots.Cloud(name, x, y, means if name == base and len(lengths) > 1 else None))
        panels.append((title, label, clouds))
    plots.clouds(path, panels, "bits per byte")


def _mean(runs: list[Run], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in runs)

"""What a sweep found, as sweep.md with its plot and sweep.json: the models, the fits, the best tokens per parameter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evals.report import plots
from nanochat_jax.config import SweepConfig
from nanochat_jax.files import atomic_write_json, atomic_write_text
from nanochat_jax.planning import fit
from nanochat_jax.planning.fit import LEVEL, Cost, Interval, LawFit, NoFit, Optimum, Parabolas
from nanochat_jax.words import DASH, count, listed, table

PLOT = "isoflop.png"
TWICE = 1.05  # passes over the text beyond which rows have come again


@dataclasses.dataclass(frozen=True)
class Result:
    """A model that was trained. params: scaling parameters, of which `budget` and the fits speak."""

    name: str
    budget: float
    depth: int
    width: int
    params: int
    all_params: int
    tokens: int
    epochs: float  # passes over the packed text
    flops_per_token: int
    val_bpb: float
    val_loss: float  # nats per token
    seconds: float

    @property
    def flops(self) -> int:
        return self.tokens * self.flops_per_token


@dataclasses.dataclass(frozen=True)
class Found:
    """The fits, or in their place the reason why there is none."""

    cost: Cost | None
    parabolas: Parabolas | str
    law: LawFit | str

    @property
    def best(self) -> tuple[Optimum, str] | None:
        """At the largest budget, and by what: the law, which all points have a say in, or else a parabola."""
        if isinstance(self.law, LawFit):
            return self.law.optima[-1], "the law"
        located = [p.optimum for p in self.parabolas.each if p.optimum] if isinstance(self.parabolas, Parabolas) else []
        return (located[-1], "a parabola") if located else None


def fitted(sweep: SweepConfig, found: list[Result]) -> Found:
    params = [r.params for r in found]
    if len(set(params)) < fit.SIZES:
        why = f"a fit needs {fit.SIZES} sizes of model, here are {len(set(params))}"
        return Found(None, why, why)
    cost, losses = Cost.of(params, [r.flops_per_token for r in found]), [r.val_loss for r in found]
    parabolas: Parabolas | str = "only budgets of FLOPs (sweep.flops) give iso-FLOP curves"
    if sweep.flops:
        parabolas = _or_why(fit.fit_parabolas, params, losses, [r.budget for r in found], cost)
    budgets = sorted({r.budget for r in found}) if sweep.flops else [max(r.flops for r in found)]
    return Found(cost, parabolas, _or_why(fit.fit_law, params, [r.tokens for r in found], losses, cost, budgets))


def _or_why(fitting, *args):
    try:
        return fitting(*args)
    except NoFit as e:
        return str(e)


def write(out: Path, sweep: SweepConfig, found: list[Result], failed: list[str]) -> dict:
    """Writes sweep.md, sweep.json and the plot; returns what is said of the sweep in one line."""
    fits = fitted(sweep, found)

    def plain(of):
        return {"why_not": of} if isinstance(of, str) else of and dataclasses.asdict(of)

    figures = {
        "models": [{**dataclasses.asdict(r), "flops": r.flops} for r in found],
        "failed": failed,
        "level": LEVEL,
        "flops_per_token": plain(fits.cost),
        "parabolas": plain(fits.parabolas),
        "law": plain(fits.law),
        "best": fits.best and {**dataclasses.asdict(fits.best[0]), "by": fits.best[1]},
    }
    atomic_write_json(out / "sweep.json", figures)
    draw(out / PLOT, sweep, found, fits)
    sections = [_head(found, fits), _models(found), _parabolas(fits), _law(fits), _doubts(found, fits, failed)]
    atomic_write_text(out / "sweep.md", "\n\n".join(sections) + "\n")
    best = fits.best and dataclasses.asdict(fits.best[0].ratio)
    return {"out": str(out), "models": len(found), "failed": failed, "tokens_per_parameter": best}


def _head(found: list[Result], fits: Found) -> str:
    depths, budgets = (sorted({getattr(r, name) for r in found}) for name in ("depth", "budget"))
    said = f"{len(found)} base models, d{depths[0]} to d{depths[-1]}, budgets: {len(budgets)}."
    if fits.best:
        best, by = fits.best
        said += (
            f" At {best.flops:.2e} FLOPs {by} puts the least loss at **{_round(best.ratio)} tokens per parameter** "
            f"({LEVEL:.0%} interval {_range(best.ratio)}): {count(best.params.value)} parameters, "
            f"{count(best.tokens.value)} tokens."
        )
    else:
        said += " They do not tell how many tokens a parameter should see; why is said below."
    counted = "Parameters are those of the block matrices and of the head, without the embedding tables."
    return f"# Sweep\n\n{said} {counted}\n\n![Losses by size, a curve for each budget]({PLOT})"


def _models(found: list[Result]) -> str:
    cells: dict[str, Callable[[Result], str]] = {
        "model": lambda r: r.name,
        "width": lambda r: f"{r.width}",
        "parameters": lambda r: count(r.params),
        "with tables": lambda r: count(r.all_params),
        "tokens": lambda r: count(r.tokens),
        "per parameter": lambda r: f"{r.tokens / r.params:.2f}",
        "epochs": lambda r: f"{r.epochs:.2f}",
        "FLOPs": lambda r: f"{r.flops:.2e}",
        "bits per byte": lambda r: f"{r.val_bpb:.4f}",
        "loss": lambda r: f"{r.val_loss:.4f}",
        "hours": lambda r: f"{r.seconds / 3600:.3f}",
    }
    return "## Models\n\n" + table(list(cells), [[cell(r) for cell in cells.values()] for r in found])


OPTIMUM = ("FLOPs", "best parameters", "tokens", "tokens per parameter", f"{LEVEL:.0%} interval")


def _row(best: Optimum) -> tuple[str, ...]:
    beyond = "" if best.inside else " (beyond what was tried)"
    size, ratio = count(best.params.value) + beyond, best.ratio
    return f"{best.flops:.2e}", size, count(best.tokens.value), _round(ratio), _range(ratio)


def _parabolas(fits: Found) -> str:
    title = "## A parabola for each budget\n\n"
    if isinstance(fits.parabolas, str):
        return f"{title}None: {fits.parabolas}."
    each = fits.parabolas.each
    rows = [_row(p.optimum) if p.optimum else (f"{p.flops:.2e}", f"{p.why_not}", *[DASH] * 3) for p in each]
    text = title + table(OPTIMUM, rows)
    if exponent := fits.parabolas.exponent:
        text += f"\n\nThe best size grows as the budget to the power {exponent.value:.2f} ({_range(exponent)})."
    return text


def _law(fits: Found) -> str:
    title = "## L(N, D) = E + A / N^α + B / D^β\n\n"
    if isinstance(fits.law, str):
        return f"{title}None: {fits.law}."
    constants, head = fits.law.constants, ("constant", "value", f"{LEVEL:.0%} interval")
    names = {"alpha": "α", "beta": "β", "exponent": "power of the budget in the best size"}
    rows = [(names.get(name, name), _round(i), _range(i)) for name, i in constants.items()]
    residual = f"Residuals: {fits.law.residual:.2%} of the loss, which is in nats per token."
    return "\n\n".join([title + table(head, rows), residual, table(OPTIMUM, [_row(o) for o in fits.law.optima])])


def _doubts(found: list[Result], fits: Found, failed: list[str]) -> str:
    lines = ["Every model was trained once: what chance does is known from the fits' residuals alone."]
    if again := [r for r in found if r.epochs > TWICE]:
        most = max(again, key=lambda r: r.epochs)
        lines.append(
            f"{len(again)} of {len(found)} models saw text more than once, {most.name} {most.epochs:.1f} times, which "
            "teaches less than new text: for these the law wants it new."
        )
    if failed:
        lines.append(f"Left out, because training failed: {listed(failed)}. Their log.txt says why.")
    if fits.best and not fits.best[0].inside:
        lines.append("The best size lies beyond those that were tried: it is an extrapolation.")
    return "## What to keep in mind\n\n" + "\n".join(f"- {line}" for line in lines)


def _round(i: Interval) -> str:
    return f"{i.value:.3g}"


def _range(i: Interval) -> str:
    return f"{i.low:.3g} to {i.high:.3g}"


def draw(path: Path, sweep: SweepConfig, found: list[Result], fits: Found) -> None:
    """Loss by size, and by tokens per parameter, or by FLOPs where the ratio is the budget; with what was fitted."""
    curves, law = [], fits.law.law if isinstance(fits.law, LawFit) else None
    parabolas = {p.flops: p for p in fits.parabolas.each} if isinstance(fits.parabolas, Parabolas) else {}
    for budget in sorted({r.budget for r in found}):
        mine = sorted((r for r in found if r.budget == budget), key=lambda r: r.params)
        n, d = (np.array([getattr(r, name) for r in mine], float) for name in ("params", "tokens"))
        other = d / n if sweep.flops else np.array([r.flops for r in mine], float)
        label = f"{budget:.3g} FLOPs".replace("+", "") if sweep.flops else f"{budget:g} tokens per parameter"
        lines: dict[str, Any] = {}
        dense = np.geomspace(n[0], n[-1], 100)
        tokens, right = (np.exp(np.interp(np.log(dense), np.log(n), np.log(y))) for y in (d, other))
        if law:
            lines["the law"] = (dense, right, law.loss(dense, tokens))
        if budget in parabolas:
            lines["parabolas"] = (dense, right, np.polyval(parabolas[budget].curve, np.log(dense)))
        curves.append(plots.IsoFlop(label, (n.tolist(), other.tolist()), [r.val_loss for r in mine], lines))
    axis = "tokens per parameter" if sweep.flops else "FLOPs"
    best = fits.best[0].ratio if fits.best and sweep.flops else None
    band = (best.low, best.value, best.high) if best else None
    plots.isoflops(path, curves, ("parameters", axis), "validation loss, nats per token", band)

"""Plots as PNG files. No state, no window: figures are drawn and written.

All have one width and one scale, so that their letters are of one size on the page. The colours can be told apart with
any colour vision (Okabe and Ito 2008, the purple darkened) and keep their meaning: one for each stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.words import count

STAGE_COLOURS = {"base": "#0072B2", "mid": "#D55E00", "sft": "#009E73", "rl": "#AA4499"}
COLOURS = tuple(STAGE_COLOURS.values())
INK, QUIET, GRID = "#1f2933", "#52606d", "#e4e7eb"
WIDTH, ROW, DPI = 9.0, 2.9, 180  # inches, inches, pixels of an inch: twice what a page shows


@dataclass(frozen=True)
class Series:
    """One line. `smooth` draws the points faintly and a moving average over them; `marks` dots the points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes. share: from 0 to 1; from_zero: the scale begins there.

    right: (factor, label) of a second scale, `factor` times the first.
    """

    title: str
    y_label: str
    series: Sequence[Series]
    colour: str | None = None  # of the only series; else COLOURS in turn
    share: bool = False
    from_zero: bool = False
    right: tuple[float, str] | None = None


@dataclass(frozen=True)
class Bar:
    """`other` is marked beside the bar."""

    name: str
    value: float
    error: float = 0.0
    other: float | None = None


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with up to `window` - 1 values before it."""
    out, total = [], 0.0
    for i, v in enumerate(values):
        total += v - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _figure(height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _dress(axes, title: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines[["bottom"]].set_color(GRID)
    axes.tick_params(colors=QUIET, length=0, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=QUIET, fontsize=9.5)


# ---------------------------------------------------------------------------------------------------- over steps


def draw(path: Path, panels: Sequence[Panel], *, x_label: str = "step", shared: bool = False) -> None:
    """Writes panels side by side, in two rows where they are more than three; `shared`: with one vertical scale."""
    across = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    down = -(-len(panels) // across)
    figure = _figure(ROW * down if across > 1 else 3.4)
    grid = figure.subplots(down, across, squeeze=False, sharey=shared).ravel()
    for axes, panel in zip(grid, panels):
        _panel(axes, panel, x_label)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if shared:
        for axes in grid[1:]:
            axes.set_ylabel("")
    _save(figure, path)


def _panel(axes, panel: Panel, x_label: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    colours = (panel.colour,) if panel.colour else COLOURS
    for s, colour in zip(panel.series, colours):
        style = {"color": colour, "linewidth": 1.8, "label": s.label, "solid_capstyle": "round"}
        if s.smooth and len(s.y) >= 20:
            axes.plot(s.x, s.y, color=colour, alpha=0.25, linewidth=0.7)
            axes.plot(s.x, moving_average(s.y, max(5, len(s.y) // 25)), **style)
        else:
            axes.plot(s.x, s.y, marker="o" if s.marks else None, markersize=4.5, **style)
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    elif any(s.smooth for s in panel.series):
        _frame(axes, panel.series, panel.from_zero)
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(panel.y_label)
    _dress(axes, panel.title, "both")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))
    if axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))
    if panel.right:
        factor, label = panel.right
        second = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        second.set_ylabel(label, color=QUIET, fontsize=9.5)
        second.tick_params(colors=QUIET, length=0, labelsize=9)
        second.spines[["right"]].set_visible(False)
    if len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _frame(axes, series: Sequence[Series], from_zero: bool) -> None:
    """A scale for all but the first steps, whose loss is that of guessing, and a few outliers: so the rest is read."""
    values = sorted(v for s in series for v in list(s.y)[len(s.y) // 20 :])
    outliers = len(values) // 200
    low, high = values[0], values[len(values) - 1 - outliers]
    low = min(low, 0.0) if from_zero else low
    room = 0.06 * max(high - low, 1e-6)
    axes.set_ylim(low if from_zero else low - room, high + room)


# ---------------------------------------------------------------------------------------------------- by name


def bars(
    path: Path,
    title: str,
    x_label: str,
    found: Sequence[Bar],
    *,
    zero: tuple[float, str] = (0.0, "chance"),
    mean: tuple[float, str] | None = None,
    other: str = "",
) -> None:
    """Writes bars with their standard errors, the last one on top, from a line at `zero`; another line at `mean`.

    other: what the marks beside the bars are.
    """
    figure = _figure(1.1 + 0.23 * len(found))
    axes, (origin, origin_name) = figure.add_subplot(), zero
    places = range(len(found))
    widths = [b.value - origin for b in found]
    error = {"ecolor": INK, "elinewidth": 1, "capsize": 2.5}
    errors = [b.error or math.nan for b in found]  # none is drawn where it says nothing
    axes.barh(places, widths, left=origin, height=0.66, color=COLOURS[0], alpha=0.85, xerr=errors, error_kw=error)
    axes.axvline(origin, color=INK, linewidth=1.2)
    marked = [(b.other, i) for i, b in zip(places, found) if b.other is not None]
    if marked:
        style = {"marker": "D", "s": 30, "facecolor": "white", "edgecolor": COLOURS[1], "linewidth": 1.6, "zorder": 4}
        axes.scatter(*zip(*marked), label=other, **style)
    if mean:
        value, name = mean
        axes.axvline(value, color=COLOURS[1], linewidth=1.4, linestyle=(0, (4, 3)), label=f"{name}: {value:.3f}")
    axes.set_yticks(places, [b.name for b in found])
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.margins(x=0.04)
    axes.set_xlabel(f"{x_label} (solid line: {origin_name})")
    _dress(axes, title, "x")
    axes.tick_params(axis="y", colors=INK)
    if mean or marked:
        over = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}  # the line
        axes.legend(fontsize=9, labelcolor=INK, loc="lower right", **over)
    _save(figure, path)


# ---------------------------------------------------------------------------------------------------- over sizes


@dataclass(frozen=True)
class IsoFlop:
    """The models of one budget. x: of both panels; lines: name -> (x of the left, x of the right, y), a curve each."""

    label: str
    x: tuple[Sequence[float], Sequence[float]]
    y: Sequence[float]
    lines: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]


def isoflops(
    path: Path,
    curves: Sequence[IsoFlop],
    x_labels: tuple[str, str],
    y_label: str,
    band: tuple[float, float, float] | None = None,
) -> None:
    """Writes two panels of the same losses over logarithmic scales, a colour for each budget, light to dark.

    band: low, value and high of what the right scale shows, marked there.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    figure, dashes = _figure(3.6), {"the law": "-", "parabolas": (0, (4, 3))}
    left, right = figure.subplots(1, 2, sharey=True)
    for n, curve in enumerate(curves):
        colour = colormaps["viridis_r"](0.2 + 0.8 * n / max(len(curves) - 1, 1))
        for side, axes in enumerate((left, right)):
            axes.plot(curve.x[side], curve.y, "o", color=colour, markersize=5, label=curve.label)
            for name, line in curve.lines.items():
                axes.plot(line[side], line[2], color=colour, linestyle=dashes[name], linewidth=1.5)
    if band:
        said = f"best: {band[1]:.3g} ({band[0]:.3g} to {band[2]:.3g})"
        right.axvspan(band[0], band[2], color=GRID, zorder=0, label=said)
        right.axvline(band[1], color=QUIET, linewidth=1.2)
    for name in dict.fromkeys(name for curve in curves for name in curve.lines):
        left.plot([], [], color=QUIET, linestyle=dashes[name], linewidth=1.5, label=name)
    for axes, label in zip((left, right), x_labels):
        axes.set_xscale("log")
        axes.set_xlabel(label)
        _dress(axes, f"Loss by {label}", "both")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if 1e-3 < x < 1e3 else count(x))
        axes.xaxis.set_minor_locator(NullLocator())
    left.set_ylabel(y_label)
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    if band:
        handles, labels = right.get_legend_handles_labels()
        over = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}  # the line
        right.legend(handles[-1:], labels[-1:], fontsize=9, labelcolor=INK, **over)
    _save(figure, path)

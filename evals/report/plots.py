"""Plots as PNG files, all of one width and scale, so that their letters are of one size on the page. The colours can be
told apart with any colour vision (Okabe and Ito 2008, the purple darkened) and keep their meaning: one for each stage.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.words import count

STAGE_COLOURS = {"base": "#0072B2", "mid": "#D55E00", "sft": "#009E73", "rl": "#AA4499"}
COLOURS = tuple(STAGE_COLOURS.values())
INK, QUIET, GRID = "#1f2933", "#52606d", "#e4e7eb"
WIDTH, ROW, DPI = 9.0, 2.9, 180  # inches, inches, pixels of an inch: twice what a page shows
_TICKS = {"color": QUIET, "labelsize": 9, "major.size": 0, "minor.size": 0}
STYLE = {
    "axes": {
        **{"titlelocation": "left", "titlesize": 11, "titlecolor": INK, "titleweight": "bold"},
        **{"labelsize": 9.5, "labelcolor": QUIET, "edgecolor": GRID, "axisbelow": True, "grid": True},
        **{"spines.top": False, "spines.right": False, "spines.left": False},
    },
    "grid": {"color": GRID, "linewidth": 0.8},
    "xtick": _TICKS,
    "ytick": _TICKS,
    "legend": {"frameon": False, "fontsize": 9, "labelcolor": INK},
}
_OVER_LINES = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 1}  # a legend
_DASHED = (0, (4, 3))


class Series(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False  # the points are drawn faintly, and a moving average over them
    marks: bool = False  # a dot at each point


class Panel(NamedTuple):
    title: str
    y_label: str
    series: Sequence[Series]
    colour: str | None = None  # of the only series; else COLOURS in turn
    share: bool = False  # the scale is from 0 to 1
    from_zero: bool = False  # the scale begins at 0
    right: tuple[float, str] | None = None  # (factor, label) of a second scale, `factor` times the first


class Bar(NamedTuple):
    name: str
    value: float
    error: float = 0.0


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with up to `window` - 1 values before it."""
    total = np.cumsum(values, dtype=float)
    total[window:] = total[window:] - total[:-window]
    return (total / np.minimum(np.arange(1, len(total) + 1), window)).tolist()


@contextlib.contextmanager
def _drawing(path: Path, height: float) -> Iterator:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict = {f"{group}.{name}": value for group, of in STYLE.items() for name, value in of.items()}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw(path: Path, panels: Sequence[Panel], shared: bool = False) -> None:
    """Writes panels side by side, in two rows where they are more than three; `shared`: with one vertical scale."""
    across = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    down = -(-len(panels) // across)
    with _drawing(path, ROW * down if across > 1 else 3.4) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharey=shared).ravel()
        for axes, panel in zip(grid, panels):
            _panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[1:] if shared else ():
            axes.set_ylabel("")


def _panel(axes, panel: Panel) -> None:
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
    axes.set(title=panel.title, xlabel="step", ylabel=panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis) if axes.get_ylim()[1] >= 1000 else (axes.xaxis,):
        axis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))
    if panel.right:
        factor, label = panel.right
        second = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        second.set_ylabel(label)
        second.spines[["right"]].set_visible(False)
    if len(panel.series) > 1:
        axes.legend()


def _frame(axes, series: Sequence[Series], from_zero: bool) -> None:
    """A scale for all but the first steps, whose loss is that of guessing, and a few outliers: so the rest is read."""
    values = sorted(v for s in series for v in s.y[len(s.y) // 20 :])
    low, high = min(values[0], 0.0) if from_zero else values[0], values[len(values) - 1 - len(values) // 200]
    room = 0.06 * max(high - low, 1e-6)
    axes.set_ylim(low if from_zero else low - room, high + room)


def bars(path: Path, title: str, x_label: str, found: Sequence[Bar], mean: tuple[float, str], chance: float) -> None:
    """Writes bars with their standard errors, the last one on top, from a line at `chance`; another line at `mean`."""
    with _drawing(path, 1.1 + 0.23 * len(found)) as figure:
        axes, places, (value, name) = figure.add_subplot(), range(len(found)), mean
        widths = [b.value - chance for b in found]
        error = {"ecolor": INK, "elinewidth": 1, "capsize": 2.5}
        errors = [b.error or math.nan for b in found]  # none is drawn where it says nothing
        axes.barh(places, widths, left=chance, height=0.66, color=COLOURS[0], alpha=0.85, xerr=errors, error_kw=error)
        axes.axvline(chance, color=INK, linewidth=1.2)
        axes.axvline(value, color=COLOURS[1], linewidth=1.4, linestyle=_DASHED, label=f"{name}: {value:.3f}")
        axes.set_yticks(places, [b.name for b in found])
        axes.set_ylim(-0.7, len(found) - 0.3)
        axes.margins(x=0.04)
        axes.set(title=title, xlabel=f"{x_label} (solid line: chance)")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", colors=INK)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1))  # beside the title: bars may be anywhere


class IsoFlop(NamedTuple):
    """The models of one budget. x: of both panels; lines: name -> (x of the left, x of the right, y), a curve each."""

    label: str
    x: tuple[Sequence[float], Sequence[float]]
    y: Sequence[float]
    lines: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]


def isoflops(path: Path, curves: Sequence[IsoFlop], x_labels: Sequence[str], y_label: str, band: tuple | None) -> None:
    """Writes two panels of the same losses over logarithmic scales, a colour for each budget, light to dark.

    band: low, value and high of what the right scale shows, marked there.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    dashes = {"the law": "-", "parabolas": _DASHED}
    with _drawing(path, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for n, curve in enumerate(curves):
            colour = colormaps["viridis_r"](0.2 + 0.8 * n / max(len(curves) - 1, 1))
            for side, axes in enumerate((left, right)):
                axes.plot(curve.x[side], curve.y, "o", color=colour, markersize=5, label=curve.label)
                for name, line in curve.lines.items():
                    axes.plot(line[side], line[2], color=colour, linestyle=dashes[name], linewidth=1.5)
        if band:
            low, value, high = band
            shown = right.axvspan(low, high, color=GRID, zorder=0, label=f"best: {value:.3g} ({low:.3g} to {high:.3g})")
            right.axvline(value, color=QUIET, linewidth=1.2)
            right.legend(handles=[shown], **_OVER_LINES)
        for name in dict.fromkeys(name for curve in curves for name in curve.lines):
            left.plot([], [], color=QUIET, linestyle=dashes[name], linewidth=1.5, label=name)
        for axes, label in zip((left, right), x_labels):
            axes.set(title=f"Loss by {label}", xlabel=label, xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if 1e-3 < x < 1e3 else count(x))
            axes.xaxis.set_minor_locator(NullLocator())
        left.set_ylabel(y_label)
        left.legend()


class Cloud(NamedTuple):
    """Runs of one kind, a dot each; line: through their means."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    line: tuple[Sequence[float], Sequence[float]] | None = None


def clouds(path: Path, panels: Sequence[tuple[str, str, Sequence[Cloud]]], y_label: str) -> None:
    """Writes panels (title, x label, clouds) of the same y side by side, over logarithmic scales; one legend."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator, NullLocator

    with _drawing(path, 3.6) as figure:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
        for axes, (title, x_label, of) in zip(grid, panels):
            for n, cloud in enumerate(of):
                colour = INK if cloud.line else colormaps["tab10"](n % 10)
                axes.plot(cloud.x, cloud.y, "o", color=colour, markersize=5, alpha=0.8, label=cloud.label)
                if cloud.line:
                    axes.plot(*cloud.line, color=colour, linewidth=1.5)
            axes.set(title=title, xlabel=x_label, xscale="log")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1e3 else count(x))
        grid[0].set_ylabel(y_label)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper")

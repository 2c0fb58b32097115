"""Curves of a run as PNG files: loss, bits per byte, reward. No state, no window: figures are drawn and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b7791f")
INK, GRID = "#2d3748", "#e2e8f0"


@dataclass(frozen=True)
class Series:
    """One line of a plot. `smooth` draws the points faintly and a moving average over them; `marks` dots the points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    marks: bool = False


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with up to `window` - 1 values before it."""
    out, total = [], 0.0
    for i, v in enumerate(values):
        total += v - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def draw(path: Path, title: str, y_label: str, series: Sequence[Series], *, share: bool = False) -> Path:
    """Writes one plot over training steps; `share` is a scale from 0 to 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for s, colour in zip(series, COLOURS):
        style = {"color": colour, "linewidth": 1.6, "label": s.label, "solid_capstyle": "round"}
        if s.smooth and len(s.y) >= 20:
            axes.plot(s.x, s.y, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(s.x, moving_average(s.y, max(5, len(s.y) // 25)), **style)
        else:
            axes.plot(s.x, s.y, marker="o" if s.marks or len(s.x) == 1 else None, markersize=4, **style)
    if share:
        axes.set_ylim(-0.02, 1.02)
    else:
        _skip_the_first_fall(axes, series)
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    if len(series) > 1 or series[0].label:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _skip_the_first_fall(axes, series: Sequence[Series]) -> None:
    """Lets the first steps, whose loss is that of guessing, leave the plot at the top, so that the rest can be read."""
    values = sorted(v for s in series for v in list(s.y)[max(1, len(s.y) // 20) :])
    if len(values) < 20:
        return
    low, high = values[0], values[-1]
    room = 0.06 * max(high - low, 1e-6)
    axes.set_ylim(low - room, high + room)

"""A run as it goes, in a terminal beside it: what each stage has done, curves, the last samples, the end of the log.

    python -m nanochat_jax.watch runs/demo              # until Ctrl-C; `--once` prints one frame

It reads the run directory and nothing else, writes nothing, and so works on a run of another user or host, on one that
was stopped and on one that is over. It needs no jax, and is there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nanochat_jax.cli import command
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.tracking.alarms import STALL_SECONDS, STALL_TIMES
from nanochat_jax.tracking.tracking import read_records

STAGES = ("base", "mid", "sft", "rl")
RECENT = 32  # steps over which rates and losses are taken
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 20  # characters
LOG_LINES, SAMPLES, SAMPLE_CHARS = 6, 3, 220


def sparkline(values: Sequence[float], width: int = CURVE) -> str:
    """Means of `width` parts of the values, as blocks between the least and the most; shorter where there are fewer."""
    parts = min(width, len(values))
    edges = [i * len(values) // parts for i in range(parts + 1)] if parts else []
    means = [statistics.fmean(values[a:b]) for a, b in zip(edges, edges[1:])]
    low, high = (min(means), max(means)) if means else (0, 0)
    return "".join(BLOCKS[round((m - low) / ((high - low) or 1) * (len(BLOCKS) - 1))] for m in means)


@dataclass(frozen=True)
class StageView:
    """What the records of a stage say, and its done mark where it is over."""

    name: str
    records: list[dict]
    done: dict | None

    @cached_property
    def steps(self) -> list[dict]:
        return [r for r in self.records if "loss" in r]

    @property
    def step(self) -> int:
        return max((r["step"] for r in self.records), default=0)

    @property
    def of(self) -> int | None:
        """Steps of the whole stage."""
        return self.last("of") or (self.done or {}).get("steps")

    def last(self, name: str):
        """The newest value that there is."""
        return next((r[name] for r in reversed(self.records) if r.get(name) is not None), None)

    def values(self, name: str) -> list[float]:
        return [r[name] for r in self.records if r.get(name) is not None]

    def recent(self, name: str) -> float | None:
        """The median of the last steps."""
        found = [r[name] for r in self.steps[-RECENT:] if r.get(name) is not None]
        return statistics.median(found) if found else None

    @cached_property
    def pace(self) -> float | None:
        """Seconds a step, evaluations between them included; a time in which the run was stopped is not."""
        times = [r["time"] for r in self.steps[-8 * RECENT :]]
        gaps = [b - a for a, b in zip(times, times[1:])]
        if not gaps:
            return None
        longest = max(STALL_SECONDS, STALL_TIMES * statistics.median(gaps))
        return statistics.fmean(min(g, longest) for g in gaps)

    def state(self, now: float) -> tuple[str, str]:
        """(what it does, its colour)."""
        if self.done:
            return f"done {duration(self.done['seconds'])}", "green"
        if not self.records:
            return "", ""
        silent = now - self.records[-1]["time"]
        if silent > max(STALL_SECONDS, STALL_TIMES * (self.pace or 0)):
            return f"silent for {duration(silent)}", "red"
        if self.of and self.pace:
            return f"{duration((self.of - self.step) * self.pace)} left", "cyan"
        return "running", "cyan"


def duration(seconds: float) -> str:
    """3 s, 4:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0")


def compact(value: float | None) -> str:
    """812, 6.9k, 983k, 1.1M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value is not None and value >= size:
            return f"{value / size:.{1 if value < 100 * size else 0}f}{unit}"
    return "" if value is None else f"{value:.0f}"


class RunView:
    """A run directory, read anew where files have changed. UserError where it is none."""

    def __init__(self, run_dir: Path):
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir} is not a run directory (it has no config.yaml); run_speedrun.py makes one")
        self.dir = run_dir
        self._read: dict[Path, tuple] = {}  # path -> (size and time of change, records)

    def records(self, stage: str) -> list[dict]:
        path = self.dir / stage / "metrics.jsonl"
        try:
            found = path.stat()
        except FileNotFoundError:
            return []
        mark = (found.st_size, found.st_mtime_ns)
        if self._read.get(path, (None,))[0] != mark:
            self._read[path] = mark, read_records(path)
        return self._read[path][1]

    def stages(self) -> list[StageView]:
        return [StageView(s, self.records(s), read_json(self.dir / s / "done.json")) for s in STAGES]

    def done(self, stage: str) -> float | None:
        """Seconds of a stage without records that is over."""
        mark = read_json(self.dir / stage / "done.json")
        return mark["seconds"] if mark else None

    def log(self) -> list[str]:
        """The last lines of log.txt, without their dates."""
        path = self.dir / "log.txt"
        if not path.is_file():
            return []
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - 8192))
            lines = f.read().decode("utf-8", "replace").splitlines()
        return [re.sub(r"^\d{4}-\d\d-\d\d ", "", line) for line in lines if line.strip()][-LOG_LINES:]

    def samples(self) -> tuple[str, list[str]]:
        """(where they are from, texts): of the stage evaluated last, else what a stage recorded last."""
        for stage in reversed(STAGES):
            found = read_json(self.dir / "evals" / f"{stage}.json")
            if found and found.get("samples"):
                between = "" if stage == "base" else "  →  "
                texts = [s["prompt"] + between + s["completion"].strip("\n") for s in found["samples"]]
                return f"{stage}, evaluated", texts[:SAMPLES]
            noted = [r for r in self.records(stage) if r.get("sample")]
            if noted:
                return f"{stage}, step {noted[-1]['step']:,}", noted[-1]["sample"].splitlines()[:SAMPLES]
        return "", []


def frame(view: RunView, now: float) -> RenderableType:
    """One picture of the run at the time `now`, in seconds since 1970."""
    stages = view.stages()
    parts: list[RenderableType] = [Text(f"{view.dir}", style="bold"), _table(view, stages, now)]
    alarms = [(s.name, r["step"], r["alarm"]) for s in stages for r in s.records if r.get("alarm")]
    if alarms:
        lines = [f"{name} step {step:,}: {text}" for name, step, text in alarms[-3:]]
        parts.append(Panel(Text("\n".join(lines)), title=f"alarms ({len(alarms)})", border_style="red"))
    source, texts = view.samples()
    if texts:
        cut = [" ".join(t.split())[:SAMPLE_CHARS] for t in texts]
        parts.append(Panel(Text("\n".join(cut)), title=f"samples ({source})", title_align="left", border_style="dim"))
    if log := view.log():
        text = Text("\n".join(log), no_wrap=True, overflow="ellipsis")
        parts.append(Panel(text, title="log.txt", title_align="left", border_style="dim"))
    return Group(*parts)


def _table(view: RunView, stages: list[StageView], now: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", style="bold", no_wrap=True)
    for name in ("steps", "loss", "bpb", "tok/s", "MFU", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # how it goes
    table.add_column("loss, reward", no_wrap=True)
    _simple(table, "tokenizer", view.done("tokenizer"))
    for stage in stages:
        said, colour = stage.state(now)
        table.add_row(stage.name, *_figures(stage), Text(said, style=colour), _curve(stage))
    _simple(table, "eval", view.done("eval"))
    return table


def _simple(table: Table, name: str, seconds: float | None) -> None:
    said = Text(f"done {duration(seconds)}", style="green") if seconds is not None else ""
    table.add_row(name, "", "", "", "", "", "", said, "")


def _figures(stage: StageView) -> list[str]:
    """steps, loss, bpb, tokens/s, MFU, GB as text."""
    if not stage.records:
        return [""] * 6

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    reward = stage.recent("reward")
    return [
        f"{stage.step}/{stage.of}" if stage.of and not stage.done else f"{stage.step}",
        f"r {reward:.3f}" if reward is not None else shown(stage.recent("loss"), ".4f"),
        shown(stage.last("val_bpb"), ".4f"),
        compact(stage.recent("tokens_per_second")),
        shown(stage.recent("mfu"), ".1%") or "n/a",
        shown(stage.last("memory_gb"), ".2f"),
    ]


def _curve(stage: StageView) -> str:
    return sparkline(stage.values("reward") or stage.values("loss"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.watch", description=__doc__.split("\n\n")[0])
    p.add_argument("run_dir", type=Path)
    p.add_argument("--once", action="store_true", help="print one frame and end")
    p.add_argument("--every", type=float, default=2.0, help="seconds between frames")
    return p.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args, console = parse(argv), Console()
    view = RunView(args.run_dir)
    if args.once:
        console.print(frame(view, time.time()))
        return 0
    shown = Live(frame(view, time.time()), console=console, screen=console.is_terminal, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), shown as live:  # Ctrl-C is how it ends
        while True:
            time.sleep(args.every)
            live.update(frame(view, time.time()), refresh=True)


if __name__ == "__main__":
    sys.exit(main())

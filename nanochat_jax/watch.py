"""A live dashboard of a run in the terminal: the progress of each stage, curves, the last samples, the end of the log.

    python -m nanochat_jax.watch runs/demo              # until Ctrl-C; `--once` prints one frame

It only reads the run directory, and so works on a run of another user or host, and on one that was stopped or is over.
It needs no jax, and so starts at once.
"""

import argparse
import contextlib
import datetime
import functools
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nanochat_jax.cli import command
from nanochat_jax.config import config_file
from nanochat_jax.files import read_json
from nanochat_jax.tracking.alarms import STALL_SECONDS, STALL_TIMES
from nanochat_jax.tracking.tracking import read_records
from nanochat_jax.words import count

STAGES = ("tokenizer", "base", "mid", "sft", "rl", "eval")  # the first and the last keep no records
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

    @functools.cached_property
    def steps(self) -> list[dict]:
        return [r for r in self.records if "loss" in r]

    @property
    def step(self) -> int:
        return max((r["step"] for r in self.records), default=0)

    @property
    def of(self) -> int | None:
        """Steps of the whole stage."""
        return self.last("of") or (self.done or {}).get("steps")

    def values(self, name: str) -> list:
        return [r[name] for r in self.records if r.get(name) is not None]

    def last(self, name: str):
        return (self.values(name) or [None])[-1]

    def recent(self, name: str) -> float | None:
        """The median of the last steps."""
        found = [r[name] for r in self.steps[-RECENT:] if r.get(name) is not None]
        return statistics.median(found) if found else None

    @functools.cached_property
    def pace(self) -> float | None:
        """Seconds a step, evaluations between them included; a time in which the run was stopped is not."""
        times = [r["time"] for r in self.steps[-8 * RECENT :]]
        gaps = [b - a for a, b in zip(times, times[1:])]
        if not gaps:
            return None
        longest = max(STALL_SECONDS, STALL_TIMES * statistics.median(gaps))
        return statistics.fmean(min(g, longest) for g in gaps)

    def state(self, now: float) -> tuple[str, str]:
        """(what it is doing, the colour of that)"""
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


@functools.lru_cache(maxsize=len(STAGES))
def _records(path: Path, size: int, changed: int) -> list[dict]:
    """Read again when the file's size or time of change is another."""
    return read_records(path)


def read_stage(run_dir: Path, name: str) -> StageView:
    path = run_dir / name / "metrics.jsonl"
    records = _records(path, path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else []
    return StageView(name, records, read_json(run_dir / name / "done.json"))


def _log(run_dir: Path) -> list[str]:
    """The last lines of log.txt, without their dates."""
    path = run_dir / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [re.sub(r"^\d{4}-\d\d-\d\d ", "", line) for line in lines if line.strip()][-LOG_LINES:]


def _samples(run_dir: Path, stages: list[StageView]) -> tuple[str, list[str]]:
    """(their source, texts): of the stage evaluated last, else what a stage recorded last."""
    for stage in reversed(stages):
        found = read_json(run_dir / "evals" / f"{stage.name}.json")
        if found and found.get("samples"):
            between = "" if stage.name == "base" else "  →  "
            texts = [s["prompt"] + between + s["completion"].strip("\n") for s in found["samples"]]
            return f"{stage.name}, evaluated", texts[:SAMPLES]
        noted = [r for r in stage.records if r.get("sample")]
        if noted:
            return f"{stage.name}, step {noted[-1]['step']:,}", noted[-1]["sample"].splitlines()[:SAMPLES]
    return "", []


def frame(run_dir: Path, now: float) -> RenderableType:
    """One picture of the run at the time `now`, in seconds since 1970."""
    stages = [read_stage(run_dir, name) for name in STAGES]
    parts: list[RenderableType] = [Text(f"{run_dir}", style="bold"), _table(stages, now)]
    alarms = [f"{s.name} step {r['step']:,}: {r['alarm']}" for s in stages for r in s.records if r.get("alarm")]
    if alarms:
        parts.append(Panel(Text("\n".join(alarms[-3:])), title=f"alarms ({len(alarms)})", border_style="red"))
    source, texts = _samples(run_dir, stages)
    if texts:
        cut = [" ".join(t.split())[:SAMPLE_CHARS] for t in texts]
        parts.append(Panel(Text("\n".join(cut)), title=f"samples ({source})", title_align="left", border_style="dim"))
    if log := _log(run_dir):
        text = Text("\n".join(log), no_wrap=True, overflow="ellipsis")
        parts.append(Panel(text, title="log.txt", title_align="left", border_style="dim"))
    return Group(*parts)


def _table(stages: list[StageView], now: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", style="bold", no_wrap=True)
    for name in ("steps", "loss", "bpb", "tok/s", "MFU", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # its state
    table.add_column("loss, reward", no_wrap=True)
    for stage in stages:
        state, colour = stage.state(now)
        curve = sparkline(stage.values("reward") or stage.values("loss"))
        table.add_row(stage.name, *_figures(stage), Text(state, style=colour), curve)
    return table


def _figures(stage: StageView) -> list[str]:
    """steps, loss, bpb, tokens/s, MFU, GB as text."""
    if not stage.records:
        return [""] * 6

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    reward, rate = stage.recent("reward"), stage.recent("tokens_per_second")
    return [
        f"{stage.step}/{stage.of}" if stage.of and not stage.done else f"{stage.step}",
        f"r {reward:.3f}" if reward is not None else shown(stage.recent("loss"), ".4f"),
        shown(stage.last("val_bpb"), ".4f"),
        "" if rate is None else count(rate).replace(" ", ""),
        shown(stage.recent("mfu"), ".1%") or "n/a",
        shown(stage.last("memory_gb"), ".2f"),
    ]


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.watch", description=__doc__.split("\n\n")[0])
    p.add_argument("run_dir", type=Path)
    p.add_argument("--once", action="store_true", help="print one frame and end")
    p.add_argument("--every", type=float, default=2.0, help="seconds between frames")
    args, console = p.parse_args(argv), Console()
    if not 0 < args.every < 1e6:
        p.error("--every takes a number of seconds above 0")
    config_file(args.run_dir)
    if args.once:
        console.print(frame(args.run_dir, time.time()))
        return
    first = frame(args.run_dir, time.time())
    live = Live(first, console=console, screen=console.is_terminal, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), live:  # Ctrl-C is how it ends
        while True:
            time.sleep(args.every)
            live.update(frame(args.run_dir, time.time()), refresh=True)


if __name__ == "__main__":
    sys.exit(main())

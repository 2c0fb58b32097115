"""One record per step: a bar or plain lines on the console, log.txt, and metrics.jsonl.

The console is stderr: the last line on stdout belongs to the result.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0  # seconds between plain lines


class RunLog:
    """What a run says: on the console, and with time stamps in log.txt; `silent` on all hosts but one."""

    def __init__(self, run_dir: str | Path, silent: bool = False):
        self.console, self.silent = Console(stderr=True, highlight=False, quiet=silent), silent
        self.path = Path(os.devnull) if silent else Path(run_dir) / "log.txt"

    def write(self, text: str) -> None:
        """To log.txt alone."""
        stamp = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(f"{stamp}  {text}\n")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        self.write(text)


def _number(value):
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_from(path: Path, step: int) -> None:
    """Drops records of `step` and later, and a half-written last line: what a killed run wrote after its last save."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] < step or (record["step"] == step and "loss" in record):
            kept.append(line)
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(part, path)


class Tracker:
    """Records of one stage: `record` appends to <stage>/metrics.jsonl and moves the bar, or prints a line at times."""

    def __init__(self, run_dir: str | Path, stage: str, total_steps: int, log: RunLog, start: int = 0):
        self.stage, self.total, self.log = stage, total_steps, log
        path = Path(run_dir) / stage / "metrics.jsonl"
        if log.silent:
            path = Path(os.devnull)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate_from(path, start)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the stage)
        self._first, self._begun, self._last_line = start, None, 0.0
        self._bar = None
        if log.console.is_terminal and not log.silent:
            columns = (
                TextColumn("{task.description:>5}"),
                BarColumn(None),
                TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bar = Progress(*columns, console=log.console)
            self._task = self._bar.add_task(stage, total=total_steps, completed=start, text="compiling")
            self._bar.start()

    def record(self, step: int, **metrics) -> None:
        """Appends {"step", "time", ...}; floats that are not finite become null."""
        row = {"step": step, "time": round(time.time(), 3), **{k: _number(v) for k, v in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        now = time.perf_counter()
        if "loss" not in metrics:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
            self.log.say(f"{self.stage} {step}/{self.total}  {shown}")
            return
        if self._begun is None:  # the first step compiles: the rate starts after it
            self._first, self._begun = step, now
        text = self._text(metrics)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        if now - self._last_line >= PLAIN_EVERY or step == self.total:
            self._last_line = now
            line = f"{self.stage} {step}/{self.total}  {text}  {self._left(step, now)}"
            self.log.write(line) if self._bar else self.log.say(line)

    @staticmethod
    def _text(metrics: dict) -> str:
        mfu = metrics.get("mfu")
        parts = [f"loss {metrics['loss']:.4f}"]
        if "reward" in metrics:
            parts.append(f"reward {metrics['reward']:.3f}")
        parts.append(f"{metrics.get('tokens_per_second', 0):,.0f} tok/s")
        parts.append(f"MFU {100 * mfu:.1f} %" if mfu is not None else "MFU n/a")
        return "  ".join(parts)

    def _left(self, step: int, now: float) -> str:
        if step <= self._first:
            return "left: n/a"
        seconds = (now - self._begun) / (step - self._first) * (self.total - step)
        return f"left: {datetime.timedelta(seconds=round(seconds))}"

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        self._file.close()


def peak_memory_gb() -> float:
    """The most memory that this process has held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*args: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        out = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def system_info() -> dict:
    """What the run ran on: names, counts, versions; memory in GB; the commit, or None outside a checkout."""
    import flax
    import jax
    import psutil

    commit = _git("rev-parse", "--short", "HEAD")
    if commit and _git("status", "--porcelain"):
        commit += " with changes"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "devices": [d.device_kind for d in jax.devices()],
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "commit": commit,
    }

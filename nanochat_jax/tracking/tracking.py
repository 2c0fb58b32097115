"""One record per step: a progress bar or plain lines on the console, log.txt, metrics.jsonl, and optional sinks.

A record is {"stage", "step", "of", "time"}, the last in seconds since 1970, and
- after a step: "loss", "grad_norm", "tokens_per_second", "mfu", "memory_gb" and what the stage adds, such as "reward";
- after an evaluation: "val_bpb", "core", "pass@1" and so on; "sample", a text;
- "alarm", a text, where something is wrong (`alarms.py`).
Floats that are not finite are null.

The console is stderr: the last line on stdout belongs to the result.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat_jax.config import TrackingConfig
from nanochat_jax.files import atomic_write_text
from nanochat_jax.processes import peak_memory_gb
from nanochat_jax.tracking import sinks
from nanochat_jax.tracking.alarms import LossAlarm, StallAlarm

PLAIN_EVERY = 10.0  # seconds between plain lines


class RunLog:
    """The run's messages: on the console, and with time stamps in log.txt; `silent` on all hosts but one."""

    def __init__(self, run_dir: str | Path, silent: bool = False):
        self.console, self.silent = Console(stderr=True, highlight=False, quiet=silent), silent
        self.path = Path(os.devnull) if silent else Path(run_dir) / "log.txt"
        self._told = False

    def write(self, text: str) -> None:
        """To log.txt alone. Where that fails the run goes on without it: the console has the text too."""
        stamp = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as f:
                f.write(f"{stamp}  {text}\n")
        except OSError as e:
            if not self._told:
                self.console.print(f"cannot write {self.path} ({e.strerror})", markup=False, soft_wrap=True)
            self._told = True

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        self.write(text)


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; [] where there is none. A line that is none, cut in half say, is left out."""
    out = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return [record for record in out if isinstance(record, dict) and "step" in record]


def truncate_from(path: Path, step: int) -> list[dict]:
    """Drops records after `step`, its evaluation, and a half-written last line: what a killed run wrote after its last
    save. Returns what is left."""
    if not path.exists():
        return []
    kept = [r for r in read_records(path) if r["step"] < step or (r["step"] == step and "loss" in r)]
    atomic_write_text(path, "".join(f"{json.dumps(r)}\n" for r in kept))
    return kept


class Tracker:
    """Records of one stage: `record` appends to <stage>/metrics.jsonl and moves the bar, or prints a line at times.

    `on_spike(text)` is called where the loss leaps up. Several hosts: all see the same losses, one writes.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        total_steps: int,
        log: RunLog,
        start: int = 0,
        config: TrackingConfig | None = None,
        on_spike: Callable[[str], None] | None = None,
    ):
        self.stage, self.total, self.log, self._on_spike = stage, total_steps, log, on_spike
        path = Path(os.devnull) if log.silent else Path(run_dir) / stage / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = [] if log.silent else truncate_from(path, start)
        config = TrackingConfig() if log.silent or config is None else config
        self._sinks = sinks.open_sinks(config, Path(run_dir), stage, start)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the stage)
        self._lock = threading.Lock()  # the stall alarm writes from its own thread
        self._losses = LossAlarm(r["loss"] for r in before if "loss" in r)
        self._step, self._stalls = start, StallAlarm(self._stalled)
        self.elsewhere = self._stalls.elsewhere  # a context for what is no step and no stall, such as an evaluation
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description:>5}"),
            BarColumn(None),
            TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=log.console,
            disable=log.silent or not log.console.is_terminal,
            speed_estimate_period=3600,
        )
        self._task = self._bar.add_task(stage, total=total_steps, completed=start, text="compiling")
        self._bar.start()

    def record(self, step: int, **metrics) -> None:
        """Writes a record of the step, with an alarm where its loss deserves one."""
        if "loss" not in metrics:
            self._write(step, metrics)
            self.log.say(self._at(step, *(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))))
            return
        self._step = step
        self._stalls.step()
        # the loss of RL is no likelihood: it has no level to leap from
        alarm = None if "reward" in metrics else self._losses.see(metrics["loss"])
        self._write(step, {**metrics, "memory_gb": round(device_memory_gb(), 3)} | ({"alarm": alarm} if alarm else {}))
        text, now = _figures(metrics), time.perf_counter()
        self._bar.update(self._task, completed=step, text=text)
        if now - self._last_line >= PLAIN_EVERY or step == self.total:
            self._last_line = now
            seconds = self._bar.tasks[0].time_remaining  # rich counts from the end of the first step, which compiles
            left = "n/a" if seconds is None else datetime.timedelta(seconds=round(seconds))
            line = self._at(step, text, f"left: {left}")
            self.log.say(line) if self._bar.disable else self.log.write(line)
        if alarm:
            self.log.say(self._at(step, "ALARM", alarm))
            if self._on_spike and math.isfinite(metrics["loss"]):
                self._on_spike(alarm)

    def _write(self, step: int, metrics: dict) -> None:
        # JSON has no NaN and no infinity
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        row = {"stage": self.stage, "step": step, "of": self.total, "time": round(time.time(), 3), **values}
        with self._lock:
            try:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            except OSError as e:  # which does not say which file it was
                raise OSError(e.errno, e.strerror, self._file.name) from None
            for sink in self._sinks:
                sink.write(row)

    def _at(self, step: int, *parts: str) -> str:
        return "  ".join((f"{self.stage} {step}/{self.total}", *parts))

    def _stalled(self, alarm: str) -> None:
        with contextlib.suppress(OSError):  # this is a thread: the next step will say so
            self._write(self._step, {"alarm": alarm})
        self.log.say(self._at(self._step, "ALARM", alarm))

    def close(self) -> None:
        self._stalls.close()
        if not self._bar.disable:
            self._bar.stop()
        for sink in self._sinks:
            sink.close()
        with contextlib.suppress(OSError):  # `_write` has said so
            self._file.close()


def _figures(metrics: dict) -> str:
    mfu = metrics.get("mfu")
    parts = [f"loss {metrics['loss']:.4f}"]
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
    parts.append(f"{metrics.get('tokens_per_second', 0):,.0f} tok/s")
    parts.append("MFU n/a" if mfu is None else f"MFU {100 * mfu:.1f} %")
    return "  ".join(parts)


def device_memory_gb() -> float:
    """The most memory that the first device has held, in GB; of the process where the backend does not count, as a
    CPU's."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else peak_memory_gb()


def _cpu_name() -> str:
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)", about.read_text(), re.M) if about.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


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

"""Base models trained one after the other, each an ordinary run directory in a process of its own.

All share the first one's tokenizer. The same call goes on where one was stopped. One host only.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat_jax.checkpoint import read_done
from nanochat_jax.cli import MISTAKE
from nanochat_jax.config import RunConfig, check_same, dump_yaml, read_run_config
from nanochat_jax.errors import Interrupted, UserError
from nanochat_jax.files import atomic_write_text, whole_folder
from nanochat_jax.mesh.preemption import Stop
from nanochat_jax.model import scaling
from nanochat_jax.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
SETTLED = 3  # steps that compile and warm up: their times are not counted
PROBE = 12  # steps


@dataclass(frozen=True)
class Point:
    """A model to train. budget: FLOPs, tokens, or tokens per parameter."""

    name: str
    budget: float
    config: RunConfig


@dataclass(frozen=True)
class Run:
    """A model that was trained."""

    tokens: int
    seconds: float  # of its steps alone
    bpb: float
    memory_gb: float


def point(name: str, config: RunConfig, tokens: float, seed: int) -> Point:
    """`config` with so many tokens, and a seed that is counted from its own."""
    made = replace(config, base=replace(config.base, tokens=max(1, round(tokens))), seed=config.seed + seed)
    return Point(name, tokens, made)


def probe(name: str, config: RunConfig) -> Point:
    """A run of a few steps, which tell the speed."""
    cfg = scaling.gpt_config(config.model, config.tokenizer.vocab_size)
    return point(name, config, PROBE * scaling.base_plan(cfg, config).batch_tokens, 0)


def train(points: list[Point], out: Path) -> list[str]:
    """Trains what is not trained yet; returns the names of those that failed. UserError where a run directory has other
    settings, or a run finds a mistake in them; Interrupted, after the run has saved."""
    for point in points:
        if (out / point.name / "config.yaml").is_file():
            check_same(out / point.name, point.config, "--out")
    failed = []
    for number, point in enumerate(points, 1):
        if read_done(out / point.name / "base"):
            continue
        print(f"— {point.name}, {number} of {len(points)}", file=sys.stderr, flush=True)
        status = _train_one(point, out)
        if status == MISTAKE:
            raise UserError(f"{point.name} ended with the mistake above; once it is mended the same command goes on")
        if status:
            print(f"{point.name}: exit status {status}, left out", file=sys.stderr, flush=True)
            failed.append(point.name)
    return failed


def _train_one(point: Point, out: Path) -> int:
    """The exit status of run_speedrun.py, which makes the run directory or resumes in it."""
    run_dir, config = out / point.name, out / point.name / "config.yaml"
    atomic_write_text(config, dump_yaml(point.config))
    if not read_done(run_dir / "tokenizer") and (trained := _tokenizer_of(point, out)):
        with whole_folder(run_dir / "tokenizer") as folder:
            shutil.copytree(trained, folder, dirs_exist_ok=True)
    options = ["--config", str(config), "--run-dir", str(run_dir), "--stages", "tokenizer,base"]
    with Stop() as stop:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run_speedrun.py"), *options],
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that a signal to the terminal's group comes from here alone, once
            preexec_fn=die_with_parent,  # else a sweep that was killed could not be started again
        )
        while process.poll() is None and not stop.requested:
            time.sleep(0.1)
        if stop.requested:
            process.terminate()  # it saves first
            process.wait()
            raise Interrupted(f"{stop.why} in {point.name}; the same command resumes there")
    return process.returncode


def _tokenizer_of(point: Point, out: Path) -> Path | None:
    """That which another of the runs, of the same settings and text, has trained."""
    for mark in sorted(out.glob("*/tokenizer/done.json")):
        other = read_run_config(mark.parents[1])
        if (other.tokenizer, other.data) == (point.config.tokenizer, point.config.data):
            return mark.parent
    return None


def _records(run_dir: Path) -> list[dict]:
    lines = (run_dir / "base" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def speed(run_dir: Path) -> float:
    """Tokens/s of the steps of a base model: their median, which a machine's pauses do not move."""
    rows = [r for r in _records(run_dir) if "tokens_per_second" in r]
    return statistics.median(r["tokens_per_second"] for r in rows[SETTLED:] or rows)


def base_result(run_dir: Path) -> Run:
    """Of a run whose base stage is done; else ValueError."""
    if (done := read_done(run_dir / "base")) is None:
        raise ValueError(f"{run_dir} has not trained its base model")
    memory = max(r.get("memory_gb", 0.0) for r in _records(run_dir))
    return Run(done["tokens"], done["tokens"] / speed(run_dir), done["metrics"]["val_bpb"], memory)

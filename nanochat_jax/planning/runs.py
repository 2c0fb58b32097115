"""Base models trained one after the other or some at a time, each an ordinary run directory in a process of its own.

All share the first one's tokenizer. The same call goes on where one was stopped. One host only.
"""

import os
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
from nanochat_jax.planning.tree import NOTHING, ROOT, tree
from nanochat_jax.processes import die_with_parent
from nanochat_jax.tracking.tracking import read_records
from nanochat_jax.words import listed

CODE = "code.txt"  # in a run directory: of each start, the hash of the code that ran
SETTLED = 3  # steps that compile and warm up: their times are not counted
PROBE = 12  # steps
_GPUS = Path("/proc/driver/nvidia/gpus")


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
    code: str = NOTHING  # its hash; several where it was resumed with other code


def point(name: str, config: RunConfig, tokens: float, seed: int) -> Point:
    """`config` with so many tokens, and a seed that is counted from its own."""
    made = replace(config, base=replace(config.base, tokens=max(1, round(tokens))), seed=config.seed + seed)
    return Point(name, tokens, made)


def probe(name: str, config: RunConfig) -> Point:
    """A run of a few steps, which tell the speed."""
    cfg = scaling.gpt_config(config.model, config.tokenizer.vocab_size)
    return point(name, config, PROBE * scaling.base_plan(cfg, config).batch_tokens, 0)


def train(points: list[Point], out: Path, jobs: int = 1, keep: bool = True) -> list[str]:
    """Trains what is not trained yet, `jobs` at a time; returns the names of those that failed. UserError where a run
    directory has other settings, or a run finds a mistake in them; Interrupted, after the runs have saved.

    keep: the weights; else they are removed when a run is done.
    """
    for point in points:
        if (out / point.name / "config.yaml").is_file():
            check_same(out / point.name, point.config, "--out")
    waiting = [(n, p) for n, p in enumerate(points, 1) if not read_done(out / p.name / "base")]
    free, running, failed = list(range(jobs)), dict[int, tuple[Point, subprocess.Popen]](), list[str]()
    mistaken = ""
    with Stop() as stop:
        while running or (waiting and not mistaken and not stop.requested):
            while waiting and free and not mistaken and not stop.requested:
                if running and not _tokenizer_of(waiting[0][1], out):
                    break  # until one of those that run has trained it
                number, point = waiting.pop(0)
                print(f"— {point.name}, {number} of {len(points)}", file=sys.stderr, flush=True)
                place = free.pop(0)
                running[place] = point, _start(point, out, place, jobs)
            time.sleep(0.1)
            if stop.requested:
                for _, process in running.values():
                    process.terminate()  # it saves first
            for place, (point, process) in list(running.items()):
                status = process.wait() if stop.requested else process.poll()
                if status is None:
                    continue
                del running[place]
                free.append(place)
                if not status and not keep:
                    shutil.rmtree(out / point.name / "base" / "checkpoints", ignore_errors=True)
                if status == MISTAKE:
                    mistaken = point.name
                elif status and not stop.requested:
                    print(f"{point.name}: exit status {status}, left out", file=sys.stderr, flush=True)
                    failed.append(point.name)
        if mistaken:
            raise UserError(f"{mistaken} ended with the mistake above; once it is mended the same command goes on")
        if stop.requested:
            raise Interrupted(f"{stop.why}: the runs have saved; the same command resumes them")
    return failed


def _start(point: Point, out: Path, place: int, jobs: int) -> subprocess.Popen:
    """run_speedrun.py, which makes the run directory or resumes in it, on the `place`-th of `jobs` parts of the
    machine."""
    run_dir, config = out / point.name, out / point.name / "config.yaml"
    atomic_write_text(config, dump_yaml(point.config))
    with open(run_dir / CODE, "a", encoding="utf-8") as code:
        code.write(f"{tree()}\n")
    if not read_done(run_dir / "tokenizer") and (trained := _tokenizer_of(point, out)):
        with whole_folder(run_dir / "tokenizer") as folder:
            shutil.copytree(trained, folder, dirs_exist_ok=True)
    options = ["--config", str(config), "--run-dir", str(run_dir), "--stages", "tokenizer,base"]

    def begin():
        die_with_parent()  # else what was killed could not be started again
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, _part(sorted(os.sched_getaffinity(0)), place, jobs))

    gpus = [str(n) for n, _ in enumerate(_GPUS.glob("*"))]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(_part(gpus, place, jobs))} if gpus and jobs > 1 else {}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_speedrun.py"), *options],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **seen},
        start_new_session=True,  # so that a signal to the terminal's group comes from here alone, once
        preexec_fn=begin,
    )


def _part(of: list, place: int, jobs: int) -> list:
    """The `place`-th of `jobs` equal parts; where there are fewer than jobs, they take turns."""
    size = len(of) // jobs
    return of[place * size : (place + 1) * size] if size else [of[place % len(of)]]


def _tokenizer_of(point: Point, out: Path) -> Path | None:
    """That which another of the runs, of the same settings and text, has trained."""
    for mark in sorted(out.glob("*/tokenizer/done.json")):
        other = read_run_config(mark.parents[1])
        if (other.tokenizer, other.data) == (point.config.tokenizer, point.config.data):
            return mark.parent
    return None


def speed(run_dir: Path) -> float:
    """Tokens/s of the steps of a base model: their median, which a machine's pauses do not move. UserError where it has
    none."""
    rows = [r for r in read_records(run_dir / "base" / "metrics.jsonl") if "tokens_per_second" in r]
    if not rows:
        raise UserError(f"{run_dir} has trained no step; its log.txt says why")
    return statistics.median(r["tokens_per_second"] for r in rows[SETTLED:] or rows)


def base_result(run_dir: Path) -> Run:
    """Of a run whose base stage is done; else ValueError."""
    if (done := read_done(run_dir / "base")) is None:
        raise ValueError(f"{run_dir} has not trained its base model")
    memory = max(r.get("memory_gb", 0.0) for r in read_records(run_dir / "base" / "metrics.jsonl"))
    code = (run_dir / CODE).read_text().split() if (run_dir / CODE).is_file() else [NOTHING]
    seconds, bpb = done["tokens"] / speed(run_dir), done["metrics"]["val_bpb"]
    return Run(done["tokens"], seconds, bpb, memory, listed([*dict.fromkeys(code)]))

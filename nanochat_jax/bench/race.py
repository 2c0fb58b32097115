"""Two processes that do the same work in turns, so that what else the machine does falls on both alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from nanochat_jax import hugepages

TURN = "BENCH_TURN"  # the environment's: a folder through which the suite gives a benchmark the device


class Side:
    """A process that says "ready" and from then on answers each line of its input, JSON, with one line of JSON.

    It starts at once, so that several compile beside each other, and may say "compiled" before and wait for a line.
    """

    def __init__(self, name: str, command: list[str], **popen):
        self.name, self._began, self._said = name, time.perf_counter(), ""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)

    def compiled(self) -> None:
        """Returns when all is compiled."""
        if not self._said:
            self._heard("compiled", "ready")

    def ready(self) -> None:
        """Lets it begin; returns when it is ready."""
        if self._said == "compiled":
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            self._heard("ready")

    def _heard(self, *words: str) -> None:
        while (line := self._process.stdout.readline()).strip() not in words:
            if not line:
                raise SystemExit(f"error: the {self.name} side ended before it was ready; its message is above")
        self._said = line.strip()
        self.seconds_to_ready = time.perf_counter() - self._began  # from the process's start

    def ask(self, order):
        """The answer to an order."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the {self.name} side ended in the middle of the work; its message is above")
        return json.loads(answer)

    def peak_memory_gb(self) -> float:
        """The most that it has held; n/a outside of Linux."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return float("nan")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def begin(*sides: Side) -> list[Side]:
    """The sides, ready: they compile beside each other, and use the device when it is this benchmark's turn."""
    for side in sides:
        side.compiled()
    wait_for_turn()
    for side in sides:
        side.ready()
    return list(sides)


def wait_for_turn() -> None:
    """Where the suite has started this: says that all is compiled, and returns when the device is free."""
    if TURN in os.environ:
        folder = Path(os.environ[TURN])
        (folder / "compiled").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)


def compiled() -> None:
    """A side says so, and waits until it may use the device for itself."""
    print("compiled", flush=True)
    sys.stdin.readline()


def serve(do) -> None:
    """The loop of a side: do(order) for every line of stdin."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)


def our_side(module: str, options: list[str], environment: dict[str, str] | None = None) -> Side:
    """Ours, with the environment that run_speedrun.py gives itself, and with `environment`."""
    command = [sys.executable, "-m", "nanochat_jax.bench", module, "--worker", *options]
    return Side("ours", command, env={**os.environ, **hugepages.environment(), **(environment or {})})


def reference_side(script: str, folder: str, python: str, precision: str, options: list[str]) -> Side:
    """karpathy/nanochat in `folder`, run by a Python that has torch; auto: the type that it takes by itself, which on a
    CPU is float32; beside fp8 it runs in bfloat16."""
    dtype = "bfloat16" if precision == "fp8" else precision
    env = {**os.environ, "PYTHONPATH": folder, **({} if dtype == "auto" else {"NANOCHAT_DTYPE": dtype})}
    return Side("reference", [python, str(Path(__file__).with_name(script)), *options], env=env, cwd=folder)


def add_reference(parser) -> None:
    """The options that name the reference."""
    parser.add_argument("--reference", help="a checkout of karpathy/nanochat")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python that has torch")

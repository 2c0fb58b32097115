"""What the benchmarks share: options, sides that run as processes, alternating rounds, and a table.

A benchmark is a module with `options(parser)` and `run(args) -> dict`, which `__main__` prints as JSON. Where it
compares, `worker(args)` is our side: a process that works on request. The other side is reference.py.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat_jax import processes
from nanochat_jax.cli import positive
from nanochat_jax.errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16", "fp8")
TURN = "BENCH_TURN"  # environment variable: the file that tells the suite that a benchmark waits for the device

T = TypeVar("T")


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers of 1 or more, with commas between them."""
    return [positive(n) for n in text.split(",")]


def add_shape(p: argparse.ArgumentParser, *, depth: int, rows: int, seq: int, precision="auto", several=False) -> None:
    """The options of a train step, with their defaults. several: precisions after commas."""
    p.add_argument("--depth", type=positive, default=depth)
    p.add_argument("--rows", type=positive, default=rows, help="rows of a micro-batch")
    p.add_argument("--seq", type=positive, default=seq, help="tokens of a row")
    p.add_argument("--vocab", type=positive, default=32768)
    p.add_argument("--pattern", default="SSSL", help="window of each layer: S is a quarter of a row, L all of it")
    choices = None if several else PRECISIONS
    p.add_argument("--precision", choices=choices, default=precision, help="of the products; fp8 goes with bfloat16")


def add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--depth", type=positive, default=4, help="depth of a model with random weights")
    p.add_argument("--run-dir", help="use the trained model of this run instead")
    p.add_argument("--vocab", type=positive, default=32768)
    p.add_argument("--seq", type=positive, default=2048, help="the model's context, which sizes the cache")
    p.add_argument("--dtype", default="auto", help="float32 | bfloat16")


def add_reference(p: argparse.ArgumentParser) -> None:
    p.add_argument("--reference", help="a checkout of karpathy/nanochat")
    p.add_argument("--reference-python", default=sys.executable, help="a Python that has torch")


def shown(args: argparse.Namespace, names: Sequence[str]) -> dict:
    return {name: getattr(args, name) for name in names}


class Side:
    """A process that compiles, says "compiled", waits for a line, says "ready", and from then on answers each line of
    its input, JSON, with one line of JSON. It starts at once, so that several compile beside each other."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self._began = name, time.perf_counter()
        self.said: dict[str, float] = {}  # seconds from its start
        how: dict[str, Any] = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process: Any = subprocess.Popen(command, env={**os.environ, **environment}, **how)

    def tell(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_for(self, word: str) -> None:
        while word not in self.said:
            if not (line := self._process.stdout.readline()):
                raise UserError(f"the {self.name} side ended before it was ready; its message is above")
            self.said[line.strip()] = time.perf_counter() - self._began

    def ask(self, order: Any) -> Any:
        self.tell(json.dumps(order))
        if not (answer := self._process.stdout.readline()):
            raise UserError(f"the {self.name} side ended in the middle of the work; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def ours(what: str, args: argparse.Namespace, environment: dict[str, str] | None = None, **more) -> Side:
    """Our side, the worker of benchmark `what`, with these options and `more`, in run_speedrun.py's environment."""
    order = json.dumps({**vars(args), **more})
    command = [sys.executable, "-m", "nanochat_jax.bench", what, "--worker", order]
    return Side("ours", command, {**processes.huge_pages_environment(), **(environment or {})})


def reference(what: str, args: argparse.Namespace, precision: str, **more) -> list[Side]:
    """The reference's side, or none where no checkout is named. precision: auto is the type that it takes by itself,
    which on a CPU is float32; beside fp8 it computes in bfloat16."""
    if not args.reference:
        return []
    environment = {"PYTHONPATH": args.reference}
    if precision != "auto":
        environment["NANOCHAT_DTYPE"] = "bfloat16" if precision == "fp8" else precision
    script = str(Path(__file__).with_name("reference.py"))
    order = json.dumps({**vars(args), **more})
    return [Side("reference", [args.reference_python, script, what, order], environment)]


def begin(*sides: Side) -> tuple[Side, ...]:
    """The sides, ready: they compile beside each other, and use the device when it is this benchmark's turn."""
    for side in sides:
        side.wait_for("compiled")
    wait_for_turn()
    for side in sides:
        if "ready" not in side.said:
            side.tell("go")
            side.wait_for("ready")
    return sides


@contextlib.contextmanager
def ready(*sides: Side) -> Iterator[tuple[Side, ...]]:
    yield begin(*sides)
    for side in sides:
        side.close()


def wait_for_turn() -> None:
    """Where the suite has started this: says that all is compiled, and returns when the device is free."""
    if TURN in os.environ:
        Path(os.environ[TURN]).touch()
        sys.stdin.readline()


def serve(answer: Callable[[Any], Any], begin: Callable[[], Any] = lambda: None) -> None:
    """For a worker that has compiled: waits until it may use the device for itself, begins, and answers every order."""
    print("compiled", flush=True)
    sys.stdin.readline()
    begin()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def in_turns(rounds: int, sides: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """What each side returns, round by round: they alternate, so that what else the machine does falls on all."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def spread(rates: Sequence[float]) -> dict[str, float]:
    return {"tokens_per_second": statistics.median(rates), "low": min(rates), "high": max(rates)}


def ratio(found: dict) -> dict[str, float]:
    """How many times the reference's rate ours is, where both were measured."""
    if "reference" not in found:
        return {}
    return {"ratio": found["ours"]["tokens_per_second"] / found["reference"]["tokens_per_second"]}


class Table:
    """Figures for people, printed row by row under the same names as in the JSON; the first row says which."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def row(self, name: str, figures: dict[str, Any]) -> None:
        if not self._names:
            self._names = list(figures)
            print(f"{'':32}", *(f"{n:>9}" for n in self._names))
        print(f"{name:32}", *(f"{_cell(figures.get(n)):>{max(9, len(n))}}" for n in self._names), flush=True)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"

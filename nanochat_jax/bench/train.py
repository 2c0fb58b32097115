"""Training throughput: whole steps with data and optimizer, beside the PyTorch reference where it is at hand.

    python -m nanochat_jax.bench.train
    python -m nanochat_jax.bench.train --reference DIR --reference-python ENV/bin/python

Each side is a process of its own that warms up and then runs a few steps whenever it is asked to; rounds alternate, so
that what else the machine does falls on both alike. The figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SHAPE = ("depth", "rows", "seq", "vocab")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench.train", description=__doc__.split("\n\n")[0])
    p.add_argument("--depth", type=int, default=4)
    p.add_argument("--rows", type=int, default=8, help="of a step")
    p.add_argument("--seq", type=int, default=512, help="tokens of a row")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=3, help="of a round")
    p.add_argument("--dtype", default="auto", help="float32 | bfloat16")
    p.add_argument("--reference", help="a checkout of karpathy/nanochat")
    p.add_argument("--reference-python", default=sys.executable, help="a Python that has torch")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------ our side


def worker(args: argparse.Namespace) -> None:
    """Answers each number of steps on stdin with the seconds that they took; the first line says that it is ready."""
    import jax
    import numpy as np

    from nanochat_jax import devices, optim, scaling, sharding, train
    from nanochat_jax.config import MeshConfig, ModelConfig, OptimConfig
    from nanochat_jax.data.loader import Loader
    from nanochat_jax.data.packed import PackedDataset, write_packed
    from nanochat_jax.model import graph_of
    from nanochat_jax.stages.common import place

    dtype = devices.compute_dtype(args.dtype)
    cfg = scaling.gpt_config(ModelConfig(depth=args.depth, sequence_len=args.seq), args.vocab)
    batch_tokens, mesh = args.rows * args.seq, sharding.make_mesh(MeshConfig())
    schedules = optim.make_schedules(OptimConfig(), 1000, 0.1, "modern")
    optimizer = optim.make_optimizer(cfg, OptimConfig(), schedules, batch_tokens, dtype)
    state = train.init_state(cfg, optimizer, 0, mesh)
    step = train.make_step(graph_of(cfg, dtype), optimizer, dtype)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = ((rng.integers(0, args.vocab, args.seq + 1, np.uint16),) for _ in range(64 * args.rows))
        write_packed(Path(folder) / "rows", rows, args.seq + 1, {})
        with Loader(PackedDataset(Path(folder) / "rows"), seed=0, batch_rows=args.rows) as loader:
            done = 0

            def run(n: int) -> float:
                nonlocal state, done
                began = time.perf_counter()
                for _ in range(n):
                    state, metrics = step(state, place(loader.at(done), 1, mesh))
                    done += 1
                jax.block_until_ready(metrics["loss"])
                return time.perf_counter() - began

            run(2)
            print("ready", flush=True)
            for line in sys.stdin:
                print(run(int(line)), flush=True)


# ------------------------------------------------------------------------------------------------ the race


class Side:
    """A process that runs steps when asked to."""

    def __init__(self, name: str, command: list[str], **popen):
        self.name, self.rates = name, []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)
        while (line := self._process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"error: the {name} side ended before it was ready; its message is above")

    def round(self, steps: int, tokens: int) -> None:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.rates.append(steps * tokens / float(self._process.stdout.readline()))

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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    from nanochat_jax import hugepages, scaling
    from nanochat_jax.config import ModelConfig

    shape = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    ours = [sys.executable, "-m", "nanochat_jax.bench.train", "--worker", f"--dtype={args.dtype}", *shape]
    sides = [Side("ours", ours, env={**os.environ, **hugepages.environment()})]  # as run_speedrun.py starts
    if args.reference:
        script = Path(__file__).with_name("reference_worker.py")
        env = {**os.environ, "PYTHONPATH": args.reference, "NANOCHAT_DTYPE": "float32"}
        if args.dtype != "auto":
            env["NANOCHAT_DTYPE"] = args.dtype
        sides.append(Side("reference", [args.reference_python, str(script), *shape], env=env, cwd=args.reference))
    for _ in range(args.rounds):
        for side in sides:
            side.round(args.steps, args.rows * args.seq)
    cfg = scaling.gpt_config(ModelConfig(depth=args.depth, sequence_len=args.seq), args.vocab)
    flops = scaling.flops_per_token(cfg)
    result = {"shape": {name: getattr(args, name) for name in SHAPE}, "rounds": args.rounds, "steps": args.steps}
    print(f"{'':10} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'GFLOP/s':>8} {'GB':>6}")
    for side in sides:
        rate, low, high = statistics.median(side.rates), min(side.rates), max(side.rates)
        memory = side.peak_memory_gb()
        print(f"{side.name:10} {rate:9.0f} {low:8.0f} {high:8.0f} {rate * flops / 1e9:8.1f} {memory:6.2f}")
        result[side.name] = {"tokens_per_second": rate, "low": low, "high": high, "peak_memory_gb": memory}
        side.close()
    if args.reference:
        result["ratio"] = result["ours"]["tokens_per_second"] / result["reference"]["tokens_per_second"]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training throughput: whole steps with data and optimizer, beside the PyTorch reference where it is at hand.

    python -m nanochat_jax.bench train
    python -m nanochat_jax.bench train --reference DIR --reference-python ENV/bin/python

Each side is a process of its own that warms up and then runs a few steps whenever it is asked to; rounds alternate, so
that what else the machine does falls on both alike. The figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.bench import race

SHAPE = ("depth", "rows", "seq", "vocab")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench train", description=__doc__.split("\n\n")[0])
    p.add_argument("--depth", type=int, default=4)
    p.add_argument("--rows", type=int, default=8, help="of a step")
    p.add_argument("--seq", type=int, default=512, help="tokens of a row")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=3, help="of a round")
    p.add_argument("--dtype", default="auto", help="float32 | bfloat16")
    race.add_reference(p)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------ our side


def worker(args: argparse.Namespace) -> None:
    """Answers a number of steps with the seconds that they took."""
    import jax
    import numpy as np

    from nanochat_jax import devices, optim, scaling, sharding, train
    from nanochat_jax.config import MeshConfig, ModelConfig, OptimConfig
    from nanochat_jax.data.loader import Loader
    from nanochat_jax.data.packed import PackedDataset, write_packed
    from nanochat_jax.model import graph_of

    dtype = devices.compute_dtype(args.dtype)
    cfg = scaling.gpt_config(ModelConfig(depth=args.depth, sequence_len=args.seq), args.vocab)
    batch_tokens, mesh = args.rows * args.seq, sharding.make_mesh(MeshConfig())
    schedules = optim.make_schedules(OptimConfig(), 1000, 0.1, "modern")
    optimizer = optim.make_optimizer(cfg, OptimConfig(), schedules, batch_tokens, dtype, mesh)
    state = train.init_state(cfg, optimizer, 0, mesh)
    step = train.make_step(graph_of(cfg, dtype), optimizer, dtype, mesh)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = ((rng.integers(0, args.vocab, args.seq + 1, np.uint16),) for _ in range(64 * args.rows))
        write_packed(Path(folder) / "rows", rows, args.seq + 1, {})
        split = sharding.rows(mesh, leading=1)
        dataset = PackedDataset(Path(folder) / "rows")
        with Loader(dataset, seed=0, accumulation=1, rows=args.rows, sharding=split) as loader:
            done = 0

            def run(n: int) -> float:
                nonlocal state, done
                began = time.perf_counter()
                for _ in range(n):
                    state, metrics = step(state, loader.at(done))
                    done += 1
                jax.block_until_ready(metrics["loss"])
                return time.perf_counter() - began

            run(2)
            race.serve(run)


# ------------------------------------------------------------------------------------------------ the race


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    from nanochat_jax import scaling
    from nanochat_jax.config import ModelConfig

    shape = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    sides = [race.our_side("train", [f"--dtype={args.dtype}", *shape])]
    if args.reference:
        sides.append(
            race.reference_side("reference_train.py", args.reference, args.reference_python, args.dtype, shape)
        )
    rates = {side.name: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            rates[side.name].append(args.steps * args.rows * args.seq / side.ask(args.steps))
    cfg = scaling.gpt_config(ModelConfig(depth=args.depth, sequence_len=args.seq), args.vocab)
    flops = scaling.flops_per_token(cfg)
    result = {"shape": {name: getattr(args, name) for name in SHAPE}, "rounds": args.rounds, "steps": args.steps}
    print(f"{'':10} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'GFLOP/s':>8} {'GB':>6}")
    for side in sides:
        mine = rates[side.name]
        rate, low, high, memory = statistics.median(mine), min(mine), max(mine), side.peak_memory_gb()
        print(f"{side.name:10} {rate:9.0f} {low:8.0f} {high:8.0f} {rate * flops / 1e9:8.1f} {memory:6.2f}")
        result[side.name] = {"tokens_per_second": rate, "low": low, "high": high, "peak_memory_gb": memory}
        side.close()
    if args.reference:
        result["ratio"] = result["ours"]["tokens_per_second"] / result["reference"]["tokens_per_second"]
    print(json.dumps(result))
    return 0

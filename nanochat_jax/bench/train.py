"""Training throughput: whole steps with data and optimizer, beside the PyTorch reference where it is at hand.

    python -m nanochat_jax.bench train --depth 12 --rows 16 --seq 2048 --accumulation 4 --precision fp8 --startup
    python -m nanochat_jax.bench train --reference DIR --reference-python ENV/bin/python

Each side is a process of its own that runs a few steps whenever it is asked to; rounds alternate, so that what else the
machine does falls on both alike, and the first step of a round does not count. The figure is the median over rounds.
--startup starts ours twice, with an empty and with a full cache of compiled programs, and tells the seconds from the
process's start to the end of its first step. --profile keeps a trace that Perfetto and XProf open and the program that
it is of, and tells where the time went.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.bench import race

SHAPE = ("depth", "rows", "accumulation", "seq", "vocab", "pattern")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from nanochat_jax.bench.step import add_shape

    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench train", description=__doc__.split("\n\n")[0])
    add_shape(p, depth=4, rows=8, seq=512)
    p.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    p.add_argument("--attention", default="auto", help="the backend; auto: the fastest, measured first")
    p.add_argument("--packed", help="a folder of packed rows of seq + 1 tokens; default: random ones")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=3, help="of a round")
    p.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    p.add_argument("--startup", action="store_true", help="time the start, cold and warm")
    p.add_argument("--profile", metavar="DIR", help="trace a round's steps into this folder, after the rounds")
    race.add_reference(p)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--cache", help=argparse.SUPPRESS)
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------ our side


def random_rows(folder: Path, args: argparse.Namespace) -> None:
    """Packed rows for a few steps, which then come again."""
    import numpy as np

    from nanochat_jax.data.packed import write_packed

    rng = np.random.default_rng(0)
    rows = ((rng.integers(0, args.vocab, args.seq + 1, np.uint16),) for _ in range(16 * args.rows * args.accumulation))
    write_packed(folder, rows, args.seq + 1, {})


def worker(args: argparse.Namespace) -> None:
    """Answers {"steps"} with the seconds that they took, {"profile", "steps"} with the parts' seconds, "about"."""
    import jax

    from nanochat_jax import devices
    from nanochat_jax.bench import parts
    from nanochat_jax.bench.step import RecipeStep
    from nanochat_jax.config import MeshConfig
    from nanochat_jax.data.loader import Loader
    from nanochat_jax.data.packed import PackedDataset
    from nanochat_jax.mesh import sharding
    from nanochat_jax.model import attention, scaling
    from nanochat_jax.training import memory

    if args.cache:
        devices.use_compilation_cache(Path(args.cache))
    options = {name: getattr(args, name) for name in ("seq", "vocab", "pattern", "precision")}
    made = RecipeStep(args.depth, sharding.make_mesh(MeshConfig()), **options)
    shapes, cache = attention.shapes_of(made.cfg, args.seq, made.dtype), Path(args.cache or "runs/cache")
    attention.choose(shapes, args.rows, cache, args.attention, say=lambda text: print(text, file=sys.stderr))
    compiled = made.lower(args.rows, args.accumulation).compile()
    race.compiled()
    state, done = made.init(), 0
    with tempfile.TemporaryDirectory() as folder:
        if not args.packed:
            random_rows(Path(folder) / "rows", args)
        dataset = PackedDataset(Path(args.packed or Path(folder) / "rows"))
        rows = args.rows * sharding.data_parallel(made.mesh)
        with Loader(dataset, seed=0, accumulation=args.accumulation, rows=rows, sharding=made.split) as loader:

            def run(n: int) -> float:
                nonlocal state, done
                began = time.perf_counter()
                for _ in range(n):
                    state, metrics = compiled(state, loader.at(done))
                    done += 1
                jax.block_until_ready(metrics["loss"])
                return time.perf_counter() - began

            def answer(order):
                if order == "about":
                    return {
                        "device": jax.devices()[0].device_kind,
                        "devices": len(jax.devices()),
                        "dtype": str(made.dtype),
                        "flops_per_token": scaling.flops_per_token(made.cfg),
                        "peak_flops": devices.peak_flops(jax.devices()[0].device_kind),
                        "planned_gb": memory.needed_bytes(compiled) / 1e9,
                        "peak_gb": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9 or None,
                    }
                if "profile" not in order:
                    return run(order["steps"])
                with jax.profiler.trace(order["profile"]):
                    seconds = run(order["steps"])
                program = compiled.as_text()
                (Path(order["profile"]) / "program.txt").write_text(program)
                found = parts.by_part(Path(order["profile"]), program, order["steps"])
                return {"seconds": seconds / order["steps"], "parts": found}

            run(1)
            race.serve(answer)


# ------------------------------------------------------------------------------------------------ the race


def start(args: argparse.Namespace, shape: list[str], result: dict) -> race.Side:
    """Our side, begun; --startup: the second of its kind."""
    more = [f"--precision={args.precision}", f"--attention={args.attention}"]
    more += [f"--packed={args.packed}"] if args.packed else []
    shares = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if args.reference else {}
    if not args.startup:
        return race.our_side("train", [*more, *shape], shares)
    race.wait_for_turn()
    with tempfile.TemporaryDirectory() as cache:
        (cold,) = race.begin(race.our_side("train", [*more, *shape, f"--cache={cache}"], shares))
        cold.close()
        (side,) = race.begin(race.our_side("train", [*more, *shape, f"--cache={cache}"], shares))
    result["start_seconds"] = {"cold": cold.seconds_to_ready, "warm": side.seconds_to_ready}
    print(f"first step {cold.seconds_to_ready:.1f} s after the start, {side.seconds_to_ready:.1f} s with a full cache")
    return side


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    shape = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    result = {"shape": {name: getattr(args, name) for name in SHAPE}, "precision": args.precision}
    result |= {"rounds": args.rounds, "steps": args.steps}
    sides = [start(args, shape, result)]
    if args.reference:
        where = args.reference, args.reference_python
        sides.append(race.reference_side("reference_train.py", *where, args.precision, shape))
    race.begin(*sides)
    rates = {side.name: [] for side in sides}
    for side in sides:
        side.ask({"steps": args.warmup})
    for _ in range(args.rounds):
        for side in sides:
            side.ask({"steps": 1})  # after a pause a step is slow: a virtual machine's host has taken back freed memory
            tokens = args.steps * args.rows * args.accumulation * args.seq
            rates[side.name].append(tokens / side.ask({"steps": args.steps}))
    about = result["about"] = sides[0].ask("about")
    for side in sides:
        memory = about["peak_gb"] if side.name == "ours" else side.ask("peak_gb")
        result[side.name] = figures(rates[side.name], about, memory or side.peak_memory_gb())
    show(result, about)
    if args.reference:
        result["ratio"] = result["ours"]["tokens_per_second"] / result["reference"]["tokens_per_second"]
    if args.profile:
        result["profile"] = sides[0].ask({"profile": args.profile, "steps": 1})
        show_parts(result["profile"])
    for side in sides:
        side.close()
    print(json.dumps(result))
    return 0


def figures(rates: list[float], about: dict, memory: float) -> dict:
    """Medians and extremes of a side's rounds, tokens/s over all devices."""
    rate = statistics.median(rates)
    flops = rate * about["flops_per_token"]
    return {
        "tokens_per_second": rate,
        "low": min(rates),
        "high": max(rates),
        "tflops": flops / 1e12,
        "mfu": flops / (about["peak_flops"] * about["devices"]) if about["peak_flops"] else None,
        "peak_memory_gb": memory,
    }


def show(result: dict, about: dict) -> None:
    print(f"{about['devices']} x {about['device']}, {about['dtype']}; planned {about['planned_gb']:.2f} GB a device")
    print(f"{'':10} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'TFLOP/s':>8} {'MFU':>6} {'GB':>6}")
    for name in ("ours", "reference"):
        if name in result:
            r = result[name]
            mfu = f"{r['mfu']:.1%}" if r["mfu"] else "n/a"
            rates = f"{r['tokens_per_second']:9.0f} {r['low']:8.0f} {r['high']:8.0f}"
            print(f"{name:10} {rates} {r['tflops']:8.3f} {mfu:>6} {r['peak_memory_gb']:6.2f}")


def show_parts(profile: dict) -> None:
    whole = sum(profile["parts"].values())
    print(f"a step took {1e3 * profile['seconds']:.1f} ms while it was traced; kernels, side by side on a CPU:")
    for name, seconds in profile["parts"].items():
        print(f"{name:14} {1e3 * seconds:9.2f} ms {seconds / whole:6.1%}")

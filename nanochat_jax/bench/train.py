"""Training throughput: whole steps with data and optimizer, next to the PyTorch reference where it is at hand.

The figure is the median over rounds, whose first step does not count. --startup starts ours twice, with an empty and
with a full cache of compiled programs, and times the first step from the start of the process. --profile keeps a trace
for Perfetto and XProf with its program, and prints where the time went.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax import devices
from nanochat_jax.bench import frame, parts
from nanochat_jax.cli import positive
from nanochat_jax.config import MeshConfig
from nanochat_jax.data.loader import Loader
from nanochat_jax.data.packed import PackedDataset, write_packed
from nanochat_jax.mesh import sharding
from nanochat_jax.model import attention, scaling
from nanochat_jax.planning.step import TrainStep, recipe
from nanochat_jax.tracking.tracking import device_memory_gb
from nanochat_jax.training import memory

SHAPE = ("depth", "rows", "accumulation", "seq", "vocab", "pattern")


def options(p: argparse.ArgumentParser) -> None:
    frame.add_shape(p, depth=4, rows=8, seq=512)
    p.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a step")
    p.add_argument("--attention", default="auto", help="the backend; auto: the fastest, measured first")
    p.add_argument("--packed", help="a folder of packed rows of seq + 1 tokens; default: random ones")
    p.add_argument("--rounds", type=positive, default=5)
    p.add_argument("--steps", type=positive, default=3, help="steps of a round")
    p.add_argument("--warmup", type=positive, default=2, help="steps before the first round")
    p.add_argument("--startup", action="store_true", help="time the start, cold and warm")
    p.add_argument("--profile", metavar="DIR", help="trace a round's steps into this folder, after the rounds")
    frame.add_reference(p)


def random_rows(folder: Path, args: argparse.Namespace) -> str:
    """Packed rows for a few steps, which then come again."""
    rng = np.random.default_rng(0)
    rows = ((rng.integers(0, args.vocab, args.seq + 1, np.uint16),) for _ in range(16 * args.rows * args.accumulation))
    write_packed(folder, rows, args.seq + 1, {})
    return str(folder)


def worker(args: argparse.Namespace) -> None:
    """Answers {"steps"} with the seconds that they took, {"profile": folder} with those of a step and of its parts, and
    "about"."""
    if args.cache:
        devices.use_compilation_cache(Path(args.cache))
    config = recipe(args.depth, args.seq, args.vocab, args.pattern, args.precision)
    made = TrainStep(config, sharding.make_mesh(MeshConfig()))
    shapes, cache = attention.shapes_of(made.cfg, args.seq, made.dtype), Path(args.cache or "runs/cache")
    attention.choose(shapes, args.rows, cache, args.attention, say=partial(print, file=sys.stderr))
    compiled, batch = made.compile(args.rows, args.accumulation), made.tokens(args.rows, args.accumulation)
    (accumulation, rows, _), dataset = batch.shape, PackedDataset(Path(args.packed))
    state: Any = None
    done = 0
    with Loader(dataset, seed=0, accumulation=accumulation, rows=rows, sharding=batch.sharding) as loader:

        def run(steps: int) -> float:
            nonlocal state, done
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = compiled(state, loader.at(done))
                done += 1
            jax.block_until_ready(metrics["loss"])
            return time.perf_counter() - began

        def begin() -> None:
            nonlocal state
            state = made.init()
            run(1)

        def answer(order):
            if order == "about":
                device = jax.devices()[0]
                return {
                    "device": device.device_kind,
                    "devices": len(jax.devices()),
                    "dtype": str(made.dtype),
                    "flops_per_token": scaling.flops_per_token(made.cfg),
                    "peak_flops": devices.peak_flops(device.device_kind),
                    "planned_gb": memory.needed_bytes(compiled) / 1e9,
                    "peak_gb": device_memory_gb(),
                }
            if "steps" in order:
                return run(order["steps"])
            folder, program = Path(order["profile"]), compiled.as_text()
            with jax.profiler.trace(folder):
                seconds = run(1)
            (folder / "program.txt").write_text(program)
            return {"seconds": seconds, "parts": parts.by_part(folder, program)}

        frame.serve(answer, begin)


def start(args: argparse.Namespace, result: dict) -> frame.Side:
    """Our side, begun; with --startup the second one, whose cache is full."""
    ours = partial(frame.ours, "train", args, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if args.reference else {})
    if not args.startup:
        return ours(cache=None)
    frame.wait_for_turn()
    with tempfile.TemporaryDirectory() as cache:
        (cold,) = frame.begin(ours(cache=cache))
        cold.close()
        (side,) = frame.begin(ours(cache=cache))
    result["start_seconds"] = seconds = {"cold": cold.said["ready"], "warm": side.said["ready"]}
    print(f"first step {seconds['cold']:.1f} s after the start, {seconds['warm']:.1f} s with a full cache")
    return side


def run(args: argparse.Namespace) -> dict:
    result = {"shape": frame.shown(args, SHAPE), **frame.shown(args, ("precision", "rounds", "steps"))}
    tokens = args.steps * args.rows * args.accumulation * args.seq

    def measure(side: frame.Side) -> float:
        side.ask({"steps": 1})  # after a pause a step is slow: a virtual machine's host has taken back freed memory
        return tokens / side.ask({"steps": args.steps})

    with tempfile.TemporaryDirectory() as folder:
        args.packed = args.packed or random_rows(Path(folder) / "rows", args)
        started = start(args, result), *frame.reference("train", args, args.precision)
        with frame.ready(*started) as sides:
            for side in sides:
                side.ask({"steps": args.warmup})
            rates = frame.in_turns(args.rounds, {side.name: partial(measure, side) for side in sides})
            about = result["about"] = sides[0].ask("about")
            print(f"{about['devices']} x {about['device']}, {about['dtype']}; ", end="")
            print(f"planned {about['planned_gb']:.2f} GB a device")
            table = frame.Table()
            for side in sides:
                found: dict = frame.spread(rates[side.name])
                flops, peak = found["tokens_per_second"] * about["flops_per_token"], about["peak_flops"]
                found |= {"tflops": flops / 1e12, "mfu": flops / (peak * about["devices"]) if peak else None}
                result[side.name] = found
                found["peak_memory_gb"] = about["peak_gb"] if side is sides[0] else side.ask("peak_gb")
                table.row(side.name, found)
            if args.profile:
                profile = result["profile"] = sides[0].ask({"profile": args.profile})
                print(f"a step took {1e3 * profile['seconds']:.1f} ms while it was traced; kernels:")
                whole, table = sum(profile["parts"].values()), frame.Table()
                for name, seconds in profile["parts"].items():
                    table.row(name, {"ms": 1e3 * seconds, "share": seconds / whole})
    return result | frame.ratio(result)

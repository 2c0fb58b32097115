"""What a train step needs of a device's memory, from the compiler's analysis; nothing runs but where --check asks.

    python -m nanochat_jax.bench memory --depths 12,20,24,26 --gpus rtx4090,a100,h100,h200 [--devices 8 --fsdp 8]
    python -m nanochat_jax.bench memory --depths 4 --seq 512 --max-rows 8 --precision float32 --check

The step is compiled with 1, 8 and 16 rows; between them what is needed lies below the line, and beyond on it: with few
rows the optimizer needs the most, with many the activations. With --gpus it is
compiled for GPUs that need not be here (the `gpu` extra must be installed: uv run --extra gpu, and JAX_PLATFORMS=cpu
where there is none). Without, for this machine's devices; --check then runs one step of the planned size and compares.
On a CPU give it one depth, as what a process held once counts into its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench memory", description=__doc__.split("\n\n")[0])
    p.add_argument("--depths", default="12,20,24,26")
    p.add_argument("--gpus", help="kinds of GPU to compile for, several after commas; default: the devices at hand")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--seq", type=int, default=2048)
    p.add_argument("--precision", default="bfloat16", help="of the products: float32 | bfloat16 | fp8")
    p.add_argument("--max-rows", type=int, default=64, help="of a micro-batch on a device")
    p.add_argument("--devices", type=int, default=1, help="GPUs of the described kind, or simulated CPU devices")
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--tensor", type=int, default=1)
    p.add_argument("--check", action="store_true", help="run one step of the planned size")
    return p.parse_args(argv)


POINTS = (1, 8, 16)  # rows of the steps that are compiled
ACCUMULATION = 2  # micro-batches of the compiled step: more of them need no more memory than the second does


class Planned:
    """The step of one depth on the mesh, and the memory of its micro-batches."""

    def __init__(self, depth: int, args: argparse.Namespace, mesh, kind: str | None = None):
        from nanochat_jax.bench.step import RecipeStep
        from nanochat_jax.mesh import sharding

        self.step = RecipeStep(depth, mesh, seq=args.seq, vocab=args.vocab, precision=args.precision, kind=kind)
        self.per_device = self.step.plan.batch_tokens // args.seq // sharding.data_parallel(mesh)
        self.compiled: dict = {}

    def needed(self, rows: int) -> int:
        """Bytes a device, with `rows` at a time."""
        from nanochat_jax.training import memory

        if rows not in self.compiled:
            self.compiled[rows] = self.step.lower(rows, ACCUMULATION).compile()
        return memory.needed_bytes(self.compiled[rows])

    def estimate(self, rows: int) -> float:
        """Bytes a device with `rows` at a time, from the compiled POINTS: an upper bound between them."""
        points = [p for p in POINTS if p <= self.per_device] or [1]
        below = max((p for p in points[:-1] if p <= rows), default=points[0])
        above = next((p for p in points if p > below), below)
        if above == below:
            return self.needed(below)
        low, high = self.needed(below), self.needed(above)
        return low + (high - low) * (rows - below) / (above - below)

    def state_bytes(self) -> int:
        import jax

        leaves = jax.tree.leaves(self.step.abstract_state)
        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)

    def run(self, rows: int) -> int:
        """The most bytes of one device while one step runs for real."""
        import jax
        import numpy as np
        import psutil

        from nanochat_jax.mesh import sharding
        from nanochat_jax.tracking.tracking import peak_memory_gb

        self.needed(rows)
        before = psutil.Process().memory_info().rss / 1e9
        shape = (ACCUMULATION, rows * sharding.data_parallel(self.step.mesh), self.step.cfg.sequence_len)
        batch = jax.device_put(np.zeros(shape, np.int32), self.step.split)
        state = self.step.init()
        for _ in range(2):
            state, metrics = self.compiled[rows](state, {"tokens": batch, "targets": batch})
        jax.block_until_ready(metrics)
        stats = jax.local_devices()[0].memory_stats() or {}
        grown = (peak_memory_gb() - before) * 1e9 / jax.local_device_count()
        return int(stats.get("peak_bytes_in_use", grown))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.devices > 1 and not args.gpus and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    from nanochat_jax.devices import use_compilation_cache
    from nanochat_jax.errors import UserError

    if not args.gpus:
        use_compilation_cache(Path("runs/cache/compiled").absolute())
    print(f"{args.precision}, rows of {args.seq}; GB on a device, of those that may be planned; rows x accumulation")
    points = "  ".join(f"{f'{n} rows':>7}" for n in POINTS)
    print(f"{'devices':>16} {'depth':>5}  {'GB':>5}  {'state':>6}  {points}  {'rows':>8}", flush=True)
    try:
        out = [table_row(kind, int(depth), args) for kind in kinds(args) for depth in args.depths.split(",")]
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps({"precision": args.precision, "seq": args.seq, "steps": out}))
    return 0


def kinds(args: argparse.Namespace) -> list[str | None]:
    """The GPUs to compile for; None for the devices at hand."""
    return [k.strip() for k in args.gpus.split(",")] if args.gpus else [None]


def table_row(kind: str | None, depth: int, args: argparse.Namespace) -> dict:
    """Plans one depth for one kind of device, and prints it."""
    import jax

    from nanochat_jax.config import MeshConfig
    from nanochat_jax.devices import POOL
    from nanochat_jax.mesh import sharding
    from nanochat_jax.planning import targets
    from nanochat_jax.training import memory

    devices = targets.devices(kind, args.devices) if kind else jax.devices()
    limit = memory.MARGIN * POOL * targets.GPUS[kind].gb * 1e9 if kind else memory.device_bytes()
    mesh = sharding.make_mesh(MeshConfig(-1, args.fsdp, args.tensor), devices)
    planned = Planned(depth, args, mesh, kind)
    sizes = memory.micro_batches(planned.per_device, args.max_rows)
    rows = next((m for m in sizes if planned.estimate(m) <= limit), None)
    state = planned.state_bytes()
    fits = f"{rows} x {planned.per_device // rows}" if rows else "no"
    name = f"{mesh.size} x {kind or devices[0].device_kind}"
    needed = {n: planned.needed(n) for n in POINTS if n <= planned.per_device}
    gigabytes = "  ".join(f"{x / 1e9:7.2f}" for x in needed.values())
    print(f"{name:>16} {depth:5}  {limit / 1e9:5.1f}  {state / 1e9:6.2f}  {gigabytes}  {fits:>8}", flush=True)
    out = {"device": devices[0].device_kind, "devices": mesh.size, "limit_bytes": limit, "depth": depth, "rows": rows}
    out |= {"state_bytes": state, "needed_bytes": needed}
    if args.check and rows and not kind:
        analysed, seen = planned.needed(rows), planned.run(rows)
        print(f"{rows} rows: analysis {analysed / 1e9:.2f} GB, run {seen / 1e9:.2f} GB", flush=True)
        out |= {"analysed_bytes": analysed, "run_bytes": seen}
    return out

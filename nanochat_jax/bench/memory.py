"""What a train step needs of a device's memory, from the compiler's analysis; nothing runs but where --check asks.

    python -m nanochat_jax.bench memory --depths 12,20,24,26 --gb 24,40,80,141 [--devices 8 --fsdp 8]
    python -m nanochat_jax.bench memory --depths 4 --seq 512 --max-rows 8 --dtype float32 --check

The step is compiled for this machine's devices with one and with two rows; what more rows need lies on the line through
both. On a CPU the figures are upper bounds for a GPU: its bfloat16 products make float32 copies, and its attention
keeps blocks of scores. --check runs one step of the planned size and compares; on a CPU give it one
depth, as what a process held once counts into its peak.
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
    p.add_argument("--gb", help="memory of a device, several after commas; default: that of the device at hand")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--seq", type=int, default=2048)
    p.add_argument("--dtype", default="bfloat16", help="of the products: float32 | bfloat16")
    p.add_argument("--max-rows", type=int, default=64, help="of a micro-batch on a device")
    p.add_argument("--devices", type=int, default=1, help="simulated CPU devices; on a GPU those that there are")
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--tensor", type=int, default=1)
    p.add_argument("--check", action="store_true", help="run one step of the planned size")
    return p.parse_args(argv)


ACCUMULATION = 2  # micro-batches of the compiled step: more of them need no more memory than the second does


class Planned:
    """The step of one depth on the mesh, and the memory of its micro-batches."""

    def __init__(self, depth: int, args: argparse.Namespace, mesh):
        import jax
        import jax.numpy as jnp

        from nanochat_jax import optim, scaling, sharding, train
        from nanochat_jax.config import ModelConfig, OptimConfig
        from nanochat_jax.model import graph_of

        self.mesh, self.seq = mesh, args.seq
        self.cfg = scaling.gpt_config(ModelConfig(depth=depth, sequence_len=args.seq), args.vocab)
        plan = scaling.plan(self.cfg, ratio=12.0)
        dtype = jnp.dtype(args.dtype)
        schedules = optim.make_schedules(OptimConfig(), 1000, 0.1, "modern")
        self.optimizer = optim.make_optimizer(self.cfg, OptimConfig(), schedules, plan.batch_tokens, dtype, mesh)
        self.step = train.make_step(graph_of(self.cfg, dtype), self.optimizer, dtype, mesh)
        self.state = sharding.abstract(
            jax.eval_shape(lambda: train.init_state(self.cfg, self.optimizer, 0, mesh)), mesh
        )
        self.per_device = plan.batch_tokens // args.seq // sharding.data_parallel(mesh)
        self.compiled: dict = {}

    def needed(self, rows: int) -> int:
        """Bytes a device, with `rows` at a time."""
        import jax
        import numpy as np

        from nanochat_jax import memory, sharding

        if rows not in self.compiled:
            shape = (ACCUMULATION, rows * sharding.data_parallel(self.mesh), self.seq)
            array = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.rows(self.mesh, leading=1))
            self.compiled[rows] = self.step.lower(self.state, {"tokens": array, "targets": array}).compile()
        return memory.needed_bytes(self.compiled[rows])

    def line(self) -> tuple[float, float]:
        """(bytes with no rows, bytes a row)."""
        one, two = self.needed(1), self.needed(2)
        return 2 * one - two, two - one

    def state_bytes(self) -> int:
        import jax

        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(self.state))

    def run(self, rows: int) -> int:
        """The most bytes of one device while one step runs for real."""
        import jax
        import numpy as np
        import psutil

        from nanochat_jax import sharding, train
        from nanochat_jax.tracking import peak_memory_gb

        self.needed(rows)
        before = psutil.Process().memory_info().rss / 1e9
        shape = (ACCUMULATION, rows * sharding.data_parallel(self.mesh), self.seq)
        batch = jax.device_put(np.zeros(shape, np.int32), sharding.rows(self.mesh, leading=1))
        state = train.init_state(self.cfg, self.optimizer, 0, self.mesh)
        for _ in range(2):
            state, metrics = self.compiled[rows](state, {"tokens": batch, "targets": batch})
        jax.block_until_ready(metrics)
        stats = jax.local_devices()[0].memory_stats() or {}
        grown = (peak_memory_gb() - before) * 1e9 / jax.local_device_count()
        return int(stats.get("peak_bytes_in_use", grown))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.devices > 1 and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    import jax

    from nanochat_jax import memory, sharding
    from nanochat_jax.config import MeshConfig
    from nanochat_jax.devices import use_compilation_cache
    from nanochat_jax.errors import UserError

    use_compilation_cache(Path("runs/cache/compiled").absolute())
    try:
        mesh = sharding.make_mesh(MeshConfig(-1, args.fsdp, args.tensor))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    limits = [memory.MARGIN * float(g) * 1e9 for g in args.gb.split(",")] if args.gb else [memory.device_bytes()]
    names = [f"{limit / memory.MARGIN / 1e9:.0f} GB" for limit in limits]
    print(
        f"{mesh.size} x {jax.devices()[0].device_kind}, {args.dtype}, rows of {args.seq}; rows at a time x accumulation"
    )
    print(
        f"{'depth':>5}  {'state GB':>8}  {'no rows':>7}  {'a row':>6}  " + "  ".join(f"{n:>9}" for n in names),
        flush=True,
    )
    out = {}
    for depth in (int(d) for d in args.depths.split(",")):
        planned = Planned(depth, args, mesh)
        fixed, row = planned.line()
        sizes = memory.micro_batches(planned.per_device, args.max_rows)
        fits = [next((m for m in sizes if fixed + m * row <= limit), None) for limit in limits]
        cells = [f"{m} x {planned.per_device // m}" if m else "no" for m in fits]
        state = planned.state_bytes()
        figures = f"{depth:5}  {state / 1e9:8.2f}  {fixed / 1e9:7.2f}  {row / 1e9:6.3f}  "
        print(figures + "  ".join(f"{c:>9}" for c in cells), flush=True)
        out[depth] = {"state_bytes": state, "fixed_bytes": fixed, "row_bytes": row, "rows": dict(zip(names, fits))}
        if args.check and fits[0]:
            rows = fits[0]
            predicted, analysed, seen = fixed + rows * row, planned.needed(rows), planned.run(rows)
            print(
                f"       {rows} rows: line {predicted / 1e9:.2f} GB, analysis {analysed / 1e9:.2f} GB, "
                f"run {seen / 1e9:.2f} GB",
                flush=True,
            )
            out[depth] |= {"line_bytes": predicted, "analysed_bytes": analysed, "run_bytes": seen}
    print(json.dumps({"device": jax.devices()[0].device_kind, "devices": mesh.size, "depths": out}))
    return 0

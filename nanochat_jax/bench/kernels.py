"""What a compiled train step makes GPUs do, kernel by kernel and link by link, and the least time that it needs.

The step is compiled for GPUs that need not be here, and the optimised program read: the floor of each kernel, and with
--count the collectives and what of them the kernels do not hide. The sum ranks where time goes; it is a prediction, and
`bench train --profile` measures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.bench import frame
from nanochat_jax.cli import count, positive
from nanochat_jax.config import MeshConfig, RunConfig
from nanochat_jax.mesh import sharding
from nanochat_jax.model import attention
from nanochat_jax.planning import collectives, targets
from nanochat_jax.planning.program import RATES, Kernel, Program
from nanochat_jax.planning.step import TrainStep, base_plan, recipe


def by_part(kernels: Sequence[Kernel], gpu: str) -> dict[str, dict]:
    """part -> launches, gigabytes, teraflops and the floor's seconds, of a whole step."""
    out: dict[str, dict] = {}
    for k in kernels:
        row = out.setdefault(k.part, {"launches": 0, "gb": 0.0, "tflop": 0.0, "seconds": 0.0})
        row["launches"] += k.times
        row["gb"] += k.times * k.bytes / 1e9
        row["tflop"] += k.times * k.flops / 1e12
        row["seconds"] += k.times * k.floor(gpu)
    return out


def mesh_of(args: argparse.Namespace, devices):
    return sharding.make_mesh(MeshConfig(-1, args.fsdp, args.tensor), devices)


def compiled_text(args: argparse.Namespace, config: RunConfig, accumulation: int) -> str:
    step = TrainStep(config, mesh_of(args, targets.devices(args.gpu, args.count)), args.gpu)
    if args.attention:
        with targets.tracing(args.gpu):
            attention.choose(attention.shapes_of(step.cfg, args.seq, step.dtype), args.rows, Path(), args.attention)
    return step.compile(args.rows, accumulation).as_text() or ""


def options(p: argparse.ArgumentParser) -> None:
    frame.add_shape(p, depth=24, rows=16, seq=2048, precision="bfloat16")
    p.add_argument(
        "--accumulation", type=positive, help="micro-batches of a step; default: those of the recipe's batch"
    )
    p.add_argument("--gpu", choices=sorted(RATES), default="h100")
    p.add_argument("--count", type=positive, default=1, help="of the GPUs; beyond 8, 8 on a host, InfiniBand between")
    p.add_argument("--fsdp", type=positive, default=1)
    p.add_argument("--tensor", type=positive, default=1)
    p.add_argument("--pcie", action="store_true", help="the GPUs of a host have PCIe alone and no NVLink")
    p.add_argument("--attention", choices=tuple(attention.BACKENDS), help="the backend; default: cudnn")
    p.add_argument("--top", type=count, default=12, help="how many of the longest kernels are named")
    p.add_argument("--hlo", type=Path, help="a file of an optimised program, instead of compiling one")
    p.add_argument("--dump", type=Path, help="write the optimised program there")


def run(args: argparse.Namespace) -> dict:
    config = recipe(args.depth, args.seq, args.vocab, args.pattern, args.precision)
    _, plan = base_plan(config)
    sharing = sharding.data_parallel(mesh_of(args, np.arange(args.count)))
    tokens = args.rows * args.seq * sharing  # of a micro-batch on all devices
    accumulation = args.accumulation or max(1, plan.batch_tokens // tokens)
    text = args.hlo.read_text() if args.hlo else compiled_text(args, config, accumulation)
    if args.dump:
        args.dump.write_text(text)
    program = Program(text)
    kernels = list(program.kernels())
    parts = by_part(kernels, args.gpu)
    busy = sum(row["seconds"] for row in parts.values())
    on = f"{args.count} x {args.gpu}"
    print(f"d{args.depth}, {accumulation} x {args.rows} rows of {args.seq} on {on}, every kernel at its floor")
    table = frame.Table()
    for name, row in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
        table.row(name, {**row, "share": row["seconds"] / busy})
    out = {**frame.shown(args, ("depth", "rows", "precision", "gpu", "count")), "parts": parts, "seconds": busy}
    if args.count > 1:
        out |= crossed(program, args)
    seconds = out["seconds"]
    print(f"{1e3 * seconds:.1f} ms, {accumulation * tokens / seconds:,.0f} tokens/s at best; the longest kernels:")
    table = frame.Table()
    for k in sorted(kernels, key=lambda k: -k.times * k.floor(args.gpu))[: args.top]:
        figures = {"times": k.times, "us each": 1e6 * k.floor(args.gpu), "MB": k.bytes / 1e6}
        table.row(f"{k.part} {k.name}", figures)
    return out


def crossed(program: Program, args: argparse.Namespace) -> dict:
    """Prints the collectives; the seconds of a step with what of them is exposed, its share, and their kinds."""
    links = collectives.Links.of(args.gpu, args.count, args.pcie)
    busy, found = collectives.play(program, args.gpu, links)
    exposed, kinds = collectives.exposed(found), collectives.by_kind(found)
    hosts = "" if args.count <= targets.HOST else f", {collectives.INFINIBAND / 1e9:g} GB/s a card between hosts"
    print(f"collectives, at {collectives.REACHED:.0%} of {links.rate / 1e9:g} GB/s a direction{hosts}")
    table = frame.Table()
    for kind, row in kinds.items():
        table.row(kind, row)
    print(f"kernels wait {1e3 * exposed:.1f} of {1e3 * (busy + exposed):.1f} ms for links; the longest waits:")
    table = frame.Table()
    for c in sorted(found, key=lambda c: -c.times * c.exposed)[: args.top]:
        table.row(c.name, {"times": c.times, "MB": c.bytes / 1e6, "us": 1e6 * c.seconds, "exposed us": 1e6 * c.exposed})
    return {"seconds": busy + exposed, "exposed": exposed / (busy + exposed), "collectives": kinds}

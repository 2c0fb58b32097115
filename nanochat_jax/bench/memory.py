"""What a train step needs of a device's memory, from the compiler's analysis; nothing runs except with --check.

The step is compiled with 1, 8 and 16 rows; need lies below the line between them and on it beyond. With --gpus it is
compiled for GPUs that need not be here (uv run --extra gpu, JAX_PLATFORMS=cpu), otherwise for this machine's devices;
--check then also runs two steps. On a CPU give it one depth: the peak is that of the process.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import jax
import psutil
from scipy.interpolate import make_interp_spline

from nanochat_jax.bench import frame
from nanochat_jax.cli import positive
from nanochat_jax.config import MeshConfig
from nanochat_jax.devices import use_compilation_cache
from nanochat_jax.mesh import sharding
from nanochat_jax.model import remat, scaling
from nanochat_jax.planning import targets
from nanochat_jax.planning.footprint import Machine
from nanochat_jax.planning.step import TrainStep, recipe, sharded_bytes
from nanochat_jax.tracking.tracking import device_memory_gb
from nanochat_jax.training import memory

POINTS = (1, 8, 16)  # rows of the steps that are compiled
ACCUMULATION = 2  # micro-batches of the compiled step: more of them need no more memory than the second does


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--depths", type=frame.numbers, default="12,20,24,26")
    p.add_argument("--gpus", help="kinds of GPU to compile for, several after commas; default: the devices at hand")
    p.add_argument("--vocab", type=positive, default=32768)
    p.add_argument("--seq", type=positive, default=2048)
    p.add_argument("--precision", default="bfloat16", help="of the products: float32 | bfloat16 | fp8")
    p.add_argument("--remat", nargs="+", choices=remat.LEVELS, default=["none"], help="what is kept of a layer")
    p.add_argument("--optimizer-state", choices=("float32", "light"), default="float32")
    p.add_argument("--max-rows", type=positive, default=64, help="rows of a micro-batch on a device, at most")
    p.add_argument("--devices", type=positive, default=1, help="GPUs of the described kind, or simulated CPU devices")
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--tensor", type=int, default=1)
    p.add_argument("--check", action="store_true", help="run one step of the planned size")


def run(args: argparse.Namespace) -> dict:
    if not args.gpus:
        use_compilation_cache(Path("runs/cache/compiled").absolute())
        if args.devices > 1:
            jax.config.update("jax_num_cpu_devices", args.devices)
    print(f"{args.precision}, rows of {args.seq}; GB on a device, of those that may be planned; rows x accumulation")
    table = frame.Table()
    kinds = [kind.strip() for kind in args.gpus.split(",")] if args.gpus else [None]
    each = itertools.product(kinds, args.depths, args.remat)
    steps = [planned(kind, depth, level, args, table) for kind, depth, level in each]
    return {**frame.shown(args, ("precision", "seq")), "steps": steps}


def planned(kind: str | None, depth: int, level: str, args: argparse.Namespace, table: frame.Table) -> dict:
    """Plans one depth for one kind of device, None for those at hand, with a level of remat, and prints it."""
    devices = targets.devices(kind, args.devices) if kind else jax.devices()
    limit = Machine(kind, len(devices)).limit
    mesh = sharding.make_mesh(MeshConfig(-1, args.fsdp, args.tensor), devices)
    config = recipe(depth, args.seq, args.vocab, precision=args.precision)
    step = TrainStep(replace(config, optimizer_state=args.optimizer_state), mesh, kind)
    per_device = step.plan.batch_tokens // args.seq // sharding.data_parallel(mesh)
    points = [n for n in POINTS if n <= per_device] or [1]
    needed = {n: memory.needed_bytes(step.compile(n, ACCUMULATION, level)) for n in points}
    # bytes by rows: an upper bound between the points
    estimate = make_interp_spline(points, list(needed.values()), k=min(1, len(points) - 1))
    sizes = memory.micro_batches(per_device, args.max_rows)
    rows = next((m for m in sizes if estimate(m) <= limit), None)
    state = sharded_bytes(step.state)
    figures: dict = {"GB": limit / 1e9, "state": state / 1e9}
    figures |= {f"{n} rows": needed[n] / 1e9 if n in needed else None for n in POINTS}
    figures["fits"] = f"{rows} x {per_device // rows}" if rows else "no"
    figures["more FLOPs"] = f"{remat.again(step.cfg, level) / scaling.flops_per_token(step.cfg):.1%}"
    table.row(f"{mesh.size} x {kind or devices[0].device_kind}, depth {depth}, remat {level}", figures)
    out = {"device": devices[0].device_kind, "devices": mesh.size, "limit_bytes": limit, "depth": depth, "remat": level}
    out |= {"rows": rows, "state_bytes": state, "needed_bytes": needed}
    if args.check and rows and not kind:
        out |= check(step, rows, level)
        print(f"{rows} rows: analysis {out['analysed_bytes'] / 1e9:.2f} GB, run {out['run_bytes'] / 1e9:.2f} GB")
    return out


def check(step: TrainStep, rows: int, level: str) -> dict:
    """What the analysis says, and the most bytes of one device while two steps run for real."""
    compiled = step.compile(rows, ACCUMULATION, level)
    before = psutil.Process().memory_info().rss / 1e9
    for _ in itertools.islice(step.times(compiled, rows, ACCUMULATION), 2):
        pass
    held = device_memory_gb()
    if jax.default_backend() == "cpu":  # of the process: what it held before does not count
        held = (held - before) / jax.local_device_count()
    return {"analysed_bytes": memory.needed_bytes(compiled), "run_bytes": int(1e9 * held)}

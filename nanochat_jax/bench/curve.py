"""Losses of some hundred steps from the same weights on the same tokens: several precisions, and the reference.

    python -m nanochat_jax.bench curve --packed DIR --precision float32 --reference DIR --reference-python PYTHON
    python -m nanochat_jax.bench curve --packed DIR --depth 24 --rows 16 --accumulation 8 --precision bfloat16,fp8

Rows come in the order in which they stand in the folder of packed rows. Rates and schedules are the recipe's for so
many steps, and the reference computes in the first of the precisions. The others are compared with the first side, by
their mean losses over each tenth of the steps. Small batches at the recipe's rates are chaotic for a while after the
warm-up: weights that differ by a millionth then part by percents of the loss. --chance shows by how much, with a side
more, and a larger batch or --lr-scale makes it less.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.bench import race
from nanochat_jax.bench.train import SHAPE

ASKED = 10  # steps of an order
AWAY = 1e-6  # of every weight, where --chance is asked for


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from nanochat_jax.bench.step import add_shape

    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench curve", description=__doc__.split("\n\n")[0])
    add_shape(p, depth=4, rows=8, seq=512, several=True)
    p.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    p.add_argument("--packed", help="a folder of packed rows of seq + 1 tokens", required=True)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--lr-scale", type=float, default=1.0, help="multiplies every rate of the recipe")
    p.add_argument("--seed", type=int, default=0, help="of the weights")
    p.add_argument("--chance", action="store_true", help="a side more: the first precision, weights a millionth away")
    p.add_argument("--out", help="write every loss there, as JSON")
    race.add_reference(p)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    p.add_argument("--away", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def make(args: argparse.Namespace, precision: str):
    """The step of one side, on one device."""
    import jax

    from nanochat_jax.bench.step import RecipeStep
    from nanochat_jax.config import MeshConfig
    from nanochat_jax.mesh import sharding

    options = {name: getattr(args, name) for name in ("seq", "vocab", "pattern", "steps", "lr_scale")}
    batch = args.rows * args.accumulation * args.seq
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return RecipeStep(args.depth, mesh, precision=precision, batch_tokens=batch, **options)


def write_common(folder: Path, args: argparse.Namespace) -> None:
    """What the sides share: weights by the reference's names, tokens, and the optimizer's settings as it takes them."""
    import jax

    from nanochat_jax.config import OptimConfig
    from nanochat_jax.data.packed import PackedDataset
    from nanochat_jax.model.gpt import init_params
    from nanochat_jax.training import optim
    from nanochat_jax.weights.names import to_reference

    made, rates = make(args, "float32"), OptimConfig()
    np.savez(folder / "weights.npz", **to_reference(init_params(made.cfg, args.seed), made.cfg))
    rows = args.rows * args.accumulation
    with PackedDataset(Path(args.packed)) as packed:
        packed.wait_for(args.steps * rows)
        tokens = packed.rows(range(args.steps * rows))["tokens"]
    np.save(folder / "tokens.npy", tokens.reshape(args.steps, rows, args.seq + 1))
    scale = math.sqrt(args.rows * args.accumulation * args.seq / optim.REFERENCE_BATCH)
    names = ("unembedding_lr", "embedding_lr", "scalar_lr", "matrix_lr")
    schedules = {
        name: [float(x) for x in jax.vmap(getattr(made.schedules, name))(np.arange(args.steps, dtype=np.int32))]
        for name in ("lr", "momentum", "weight_decay")
    }
    schedules["lr"] = [args.lr_scale * lr for lr in schedules["lr"]]
    settings = {"rates": {name: scale * getattr(rates, name) for name in names}, **schedules}
    (folder / "optimizer.json").write_text(json.dumps(settings))


def worker(args: argparse.Namespace) -> None:
    """Answers {"losses": [first, end]} with the losses of these steps."""
    import jax

    from nanochat_jax.model.gpt import init_params
    from nanochat_jax.weights.names import from_reference

    made, folder = make(args, args.precision), Path(args.folder)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    with np.load(folder / "weights.npz") as weights:
        template = jax.eval_shape(lambda: init_params(made.cfg, 0))
        given = weights
        if args.away:
            rng = np.random.default_rng(1)
            given = {name: w * (1 + AWAY * rng.standard_normal(w.shape, np.float32)) for name, w in weights.items()}
        state = made.init(from_reference(given, template, made.cfg))

    def answer(order) -> list[float]:
        nonlocal state
        found = []
        for n in range(*order["losses"]):
            rows = tokens[n].astype(np.int32).reshape(args.accumulation, args.rows, -1)
            batch = {"tokens": rows[..., :-1], "targets": rows[..., 1:]}
            state, metrics = made.jitted(state, {k: jax.device_put(v, made.split) for k, v in batch.items()})
            found.append(metrics["loss"])
        return [float(x) for x in jax.device_get(found)]

    race.serve(answer)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    shape = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    more = [f"--steps={args.steps}", f"--lr-scale={args.lr_scale}", "--packed=-"]
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_common(Path(folder), args)
        ours = functools.partial(race.our_side, "curve")
        options, precisions = [*shape, *more, f"--folder={folder}"], args.precision.split(",")
        starts = {
            precision: functools.partial(ours, [*options, f"--precision={precision}"]) for precision in precisions
        }
        if args.chance:
            starts["chance"] = functools.partial(ours, [*options, f"--precision={precisions[0]}", "--away"])
        if args.reference:
            how = args.reference, args.reference_python, precisions[0], [*shape, f"--curve={folder}"]
            starts = {"reference": functools.partial(race.reference_side, "reference_train.py", *how), **starts}
        for name, begin in starts.items():  # one after the other: each may need the whole device
            (side,), losses[name] = race.begin(begin()), []
            for first in range(0, args.steps, ASKED):
                losses[name] += side.ask({"losses": [first, min(first + ASKED, args.steps)]})
            side.close()
            print(f"{name}: {losses[name][0]:.4f} to {losses[name][-1]:.4f}", flush=True)
    result = {"shape": {n: getattr(args, n) for n in SHAPE}, "steps": args.steps, "seed": args.seed}
    result["lr_scale"] = args.lr_scale
    result["sides"] = compare(losses)
    if args.out:
        Path(args.out).write_text(json.dumps({**result, "losses": losses}))
    print(json.dumps(result))
    return 0


def compare(losses: dict[str, list[float]]) -> dict[str, dict]:
    """Mean losses over tenths of the steps, and the largest distance from the first side's, as a share of it."""
    names, out = list(losses), {}
    means = {name: [float(part.mean()) for part in np.array_split(np.asarray(losses[name]), 10)] for name in names}
    print(f"{'steps':>12} " + " ".join(f"{name:>10}" for name in names))
    ends = np.cumsum([len(part) for part in np.array_split(np.asarray(losses[names[0]]), 10)])
    for n, end in enumerate(ends):
        print(f"{'to ' + str(end):>12} " + " ".join(f"{means[name][n]:10.4f}" for name in names))
    for name in names:
        away = [abs(a / b - 1) for a, b in zip(means[name], means[names[0]], strict=True)]
        single = max(abs(a / b - 1) for a, b in zip(losses[name], losses[names[0]], strict=True))
        out[name] = {"means": means[name], "largest_difference": max(away), "largest_of_a_step": single}
        print(f"{name}: tenths differ from {names[0]}'s by {max(away):.3%} at most, single steps by {single:.3%}")
    return out

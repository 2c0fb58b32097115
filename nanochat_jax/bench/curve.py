"""Losses of some hundred steps from the same weights on the same tokens: several precisions, and the reference.

Rows come in the order in which they stand in the folder of packed rows. Rates and schedules are the recipe's for so
many steps, and the reference computes in the first of the precisions. The others are compared with the first side, by
their mean losses over each tenth of the steps. Small batches at the recipe's rates are chaotic for a while after the
warm-up: weights that differ by a millionth then differ by percents of the loss. --chance adds a side that shows by how
much; a larger batch or --lr-scale makes it less.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax.bench import frame
from nanochat_jax.bench.train import SHAPE
from nanochat_jax.cli import positive
from nanochat_jax.config import MeshConfig, OptimConfig
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import init_params
from nanochat_jax.planning.step import TrainStep, recipe
from nanochat_jax.weights.names import from_reference, to_reference

ASKED = 10  # steps of an order
AWAY = 1e-6  # of every weight, where --chance is asked for


def options(p: argparse.ArgumentParser) -> None:
    frame.add_shape(p, depth=4, rows=8, seq=512, several=True)
    p.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a step")
    p.add_argument("--packed", help="a folder of packed rows of seq + 1 tokens", required=True)
    p.add_argument("--steps", type=positive, default=300)
    p.add_argument("--lr-scale", type=float, default=1.0, help="multiplies every rate of the recipe")
    p.add_argument("--seed", type=int, default=0, help="of the weights")
    p.add_argument("--chance", action="store_true", help="a side more: the first precision, weights a millionth away")
    p.add_argument("--out", help="write every loss there, as JSON")
    frame.add_reference(p)


def make(args: argparse.Namespace, precision: str) -> TrainStep:
    """The step of one side, on one device."""
    mesh, batch = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), args.rows * args.accumulation * args.seq
    more = {"batch_tokens": batch, "optim": OptimConfig(lr_scale=args.lr_scale)}
    config = recipe(args.depth, args.seq, args.vocab, args.pattern, precision, **more)
    return TrainStep(config, mesh, steps=args.steps)


def write_common(folder: Path, args: argparse.Namespace) -> None:
    """What the sides share: weights by the reference's names, tokens, and the optimizer's settings as it takes them."""
    made, rates = make(args, "float32"), OptimConfig()
    weights: dict[str, Any] = to_reference(init_params(made.cfg, args.seed), made.cfg)
    np.savez(folder / "weights.npz", **weights)
    rows = args.rows * args.accumulation
    with PackedDataset(Path(args.packed)) as packed:
        packed.wait_for(args.steps * rows)
        tokens = np.asarray(packed.rows(range(args.steps * rows))["tokens"])
    np.save(folder / "tokens.npy", tokens.reshape(args.steps, rows, args.seq + 1))
    names = ("unembedding_lr", "embedding_lr", "scalar_lr", "matrix_lr")
    steps = np.arange(args.steps, dtype=np.int32)
    settings: dict = {"rates": {name: made.plan.lr_scale * getattr(rates, name) for name in names}}
    for name in ("lr", "momentum", "weight_decay"):
        settings[name] = jax.vmap(getattr(made.schedules, name))(steps).tolist()
    settings["lr"] = [args.lr_scale * lr for lr in settings["lr"]]
    (folder / "optimizer.json").write_text(json.dumps(settings))


def worker(args: argparse.Namespace) -> None:
    """Answers {"losses": [first, end]} with the losses of these steps."""
    made, folder = make(args, args.precision), Path(args.folder)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    with np.load(folder / "weights.npz") as arrays:
        weights = dict(arrays)
    if args.away:
        rng = np.random.default_rng(1)
        weights = {name: w * (1 + AWAY * rng.standard_normal(w.shape, np.float32)) for name, w in weights.items()}
    state = made.init(from_reference(weights, made.state.params, made.cfg))
    split = made.tokens(args.rows, args.accumulation).sharding

    def answer(order) -> list[float]:
        nonlocal state
        found = []
        for n in range(*order["losses"]):
            rows = tokens[n].astype(np.int32).reshape(args.accumulation, args.rows, -1)
            state, metrics = made.jitted(
                state, jax.device_put({"tokens": rows[..., :-1], "targets": rows[..., 1:]}, split)
            )
            found.append(metrics["loss"])
        return [float(x) for x in jax.device_get(found)]

    frame.serve(answer)


def run(args: argparse.Namespace) -> dict:
    precisions = args.precision.split(",")
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_common(Path(folder), args)
        ours = partial(frame.ours, "curve", args, folder=folder)
        starts: dict[str, Callable[[], frame.Side]] = {}
        if args.reference:
            starts["reference"] = lambda: frame.reference("train", args, precisions[0], curve=folder)[0]
        for precision in precisions:
            starts[precision] = partial(ours, precision=precision, away=False)
        if args.chance:
            starts["chance"] = partial(ours, precision=precisions[0], away=True)
        for name, start in starts.items():  # one after the other: each may need the whole device
            losses[name] = []
            with frame.ready(start()) as (side,):
                for first in range(0, args.steps, ASKED):
                    losses[name] += side.ask({"losses": [first, min(first + ASKED, args.steps)]})
            print(f"{name}: {losses[name][0]:.4f} to {losses[name][-1]:.4f}", flush=True)
    result = {"shape": frame.shown(args, SHAPE), **frame.shown(args, ("steps", "seed", "lr_scale"))}
    result["sides"] = compare(losses)
    if args.out:
        Path(args.out).write_text(json.dumps({**result, "losses": losses}))
    return result


def compare(losses: dict[str, list[float]]) -> dict[str, dict]:
    """Mean losses over tenths of the steps, and the largest distance from the first side's, as a share of it."""
    first, *_ = losses
    tenths = {name: np.array_split(np.asarray(mine), 10) for name, mine in losses.items()}
    means = {name: [float(part.mean()) for part in parts] for name, parts in tenths.items()}
    table = frame.Table()
    for end, *row in zip(np.cumsum([len(part) for part in tenths[first]]), *means.values()):
        table.row(f"to step {end}", dict(zip(losses, row)))
    out = {}
    for name in losses:
        away = [abs(a / b - 1) for a, b in zip(means[name], means[first], strict=True)]
        single = max(abs(a / b - 1) for a, b in zip(losses[name], losses[first], strict=True))
        out[name] = {"means": means[name], "largest_difference": max(away), "largest_of_a_step": single}
        print(f"{name}: tenths differ from {first}'s by {max(away):.3%} at most, single steps by {single:.3%}")
    return out

"""Losses of some hundred steps from the same weights on the same tokens: several precisions, and the reference.

Rows come in the order of the packed rows, and the schedules span just these steps. The reference computes in the first
precision; all sides are compared with the first one, by mean losses over each tenth of the steps. Small batches at the
recipe's rates are chaotic after the warm-up: --chance adds a side that starts a millionth away and shows how much.
"""

import argparse
import json
import tempfile
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

AWAY = 1e-6  # of every weight, where --chance is asked for


def options(p: argparse.ArgumentParser) -> None:
    frame.add_shape(p, depth=4, rows=8, seq=512, several=True)
    p.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a step")
    p.add_argument("--packed", help="a folder of packed rows of seq + 1 tokens", required=True)
    p.add_argument("--steps", type=positive, default=300)
    p.add_argument("--lr-scale", type=float, default=1.0, help="multiplies every rate of the recipe")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights")
    p.add_argument("--chance", action="store_true", help="one more side: the first precision, weights a millionth away")
    p.add_argument("--out", help="write every loss there, as JSON")
    frame.add_reference(p)


def make(args: argparse.Namespace, precision: str) -> TrainStep:
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
    """Answers {"losses": n} with the losses of n steps."""
    made, folder = make(args, args.precision), Path(args.folder)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    with np.load(folder / "weights.npz") as arrays:
        weights = dict(arrays)
    if args.away:
        rng = np.random.default_rng(1)
        weights = {name: w * (1 + AWAY * rng.standard_normal(w.shape, np.float32)) for name, w in weights.items()}
    split, step = made.tokens(args.rows, args.accumulation).sharding, made.jitted()

    def answer(order) -> list[float]:
        state, found = made.init(from_reference(weights, made.state.params, made.cfg)), []
        for n in range(order["losses"]):
            rows = tokens[n].astype(np.int32).reshape(args.accumulation, args.rows, -1)
            batch = jax.device_put({"tokens": rows[..., :-1], "targets": rows[..., 1:]}, split)
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    frame.serve(answer)


def run(args: argparse.Namespace) -> dict:
    precisions = args.precision.split(",")
    losses: dict[str, list[float]] = {}

    def measure(name: str, side: frame.Side) -> None:
        with frame.ready(side):
            losses[name] = side.ask({"losses": args.steps})
        print(f"{name}: {losses[name][0]:.4f} to {losses[name][-1]:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write_common(Path(folder), args)
        # one after the other: each may need the whole device
        for side in frame.reference("train", args, precisions[0], curve=folder):
            measure("reference", side)
        ours = partial(frame.ours, "curve", args, folder=folder)
        for precision in precisions:
            measure(precision, ours(precision=precision, away=False))
        if args.chance:
            measure("chance", ours(precision=precisions[0], away=True))
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

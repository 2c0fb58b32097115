"""CORE: examples a second, beside the PyTorch reference with the same weights where that is at hand.

    python -m nanochat_jax.bench core --bundle DIR
    python -m nanochat_jax.bench core --bundle DIR --reference DIR --reference-python ENV/bin/python

Both sides score the same examples of every task with the same tokens, in turns, and every answer is compared. Ours is
timed with tokenizing, the reference without. "first" is our first pass, which compiles; "repeated" is the median of
the rounds after it.
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
from nanochat_jax.errors import UserError

SAMPLE_CHARS = 5_000_000  # of the bundle's texts, for a tokenizer where none is given


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench core", description=__doc__.split("\n\n")[0])
    p.add_argument("--bundle", required=True, help="the folder of the CORE bundle")
    p.add_argument("--examples", type=int, default=100, help="of a task")
    p.add_argument("--tasks", help="labels, with commas between them; default: all whose data are there")
    p.add_argument("--run-dir", help="a trained model and its tokenizer; default: random weights")
    p.add_argument("--tokenizer", help="the folder of one; default: one is trained on the bundle's texts")
    p.add_argument("--depth", type=int, default=4)
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--seq", type=int, default=2048, help="the model's context")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--dtype", default="auto", help="float32 | bfloat16")
    race.add_reference(p)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.examples < 11 or args.rounds < 1:
        p.error("needs --examples of 11 or more, ten of which stand before the one asked, and --rounds of 1 or more")
    return args


# ------------------------------------------------------------------------------------------ what both sides get


def found_tasks(args: argparse.Namespace) -> dict:
    """{label: (task, file)} of the tasks to run. UserError for a label that is not there."""
    from evals.core import find_data, load_tasks

    bundle = Path(args.bundle)
    found = {task.label: (task, path) for task in load_tasks(bundle) if (path := find_data(bundle, task)[0])}
    chosen = [t.strip() for t in args.tasks.split(",")] if args.tasks else list(found)
    if unknown := [t for t in chosen if t not in found]:
        raise UserError(f"no data of {', '.join(unknown)} in {bundle}; there are {', '.join(found)}")
    return {label: found[label] for label in chosen}


def tokenizer_of(args: argparse.Namespace, folder: Path | None = None):
    """The run's, the one named, or one trained on the texts of the bundle and saved in `folder`."""
    from nanochat_jax.config import TokenizerConfig
    from tokenizer import load_tokenizer
    from tokenizer.train import train_tokenizer

    if args.run_dir or args.tokenizer:
        return load_tokenizer(Path(args.run_dir, "tokenizer") if args.run_dir else args.tokenizer)
    texts = (line for _, path in found_tasks(args).values() for line in path.read_text(encoding="utf-8").splitlines())
    train_tokenizer(texts, folder, TokenizerConfig(args.vocab, SAMPLE_CHARS))
    return load_tokenizer(folder)


def prepare(args: argparse.Namespace, tokenizer, folder: Path) -> list[str]:
    """Writes the weights by the reference's names and the ids of all prompts; the options that name them."""
    import numpy as np
    from flax import nnx

    from evals.core import fewshot_indices, load_examples, render_prompts
    from nanochat_jax.weights.names import to_reference

    model, texts = load(args), set()
    cfg = model.cfg
    if cfg.init != "modern":
        raise UserError("the reference runs the modern architecture only; take another --run-dir")
    np.savez(folder / "weights.npz", **to_reference(nnx.to_pure_dict(nnx.split(model)[1]), cfg))
    for task, path in found_tasks(args).values():
        examples = load_examples(path, args.examples)
        for i, item in enumerate(examples):
            shots = [examples[j] for j in fewshot_indices(i, len(examples), task.num_fewshot)]
            texts.update(render_prompts(task.task_type, item, task.delimiter, shots))
    ids = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    (folder / "ids.json").write_text(json.dumps(ids))
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    sizes = json.dumps({name: getattr(cfg, name) for name in names})
    files = [f"--weights={folder / 'weights.npz'}", f"--ids={folder / 'ids.json'}"]
    return [*files, f"--sizes={sizes}", f"--bos={tokenizer.bos}"]


def load(args: argparse.Namespace):
    """The run's model, or one of random weights with every part of the architecture at work."""
    from nanochat_jax.bench import decode

    model = decode.load(args)
    if not args.run_dir:
        model.smear_lambda[...] = model.smear_lambda[...] + 0.5
    return model


# ------------------------------------------------------------------------------------------------ our side


def worker(args: argparse.Namespace) -> None:
    """Answers {"label", "examples"} with the seconds and whether each example was answered right."""
    from evals.core import evaluate_task, load_examples
    from evals.scoring import Scorer
    from nanochat_jax.config import MeshConfig
    from nanochat_jax.mesh import sharding

    scorer = Scorer(load(args), mesh=sharding.make_mesh(MeshConfig()))
    tokenizer, tasks = tokenizer_of(args), found_tasks(args)

    def run(order: dict) -> dict:
        task, path = tasks[order["label"]]
        examples = load_examples(path, order["examples"])
        began = time.perf_counter()
        right = evaluate_task(scorer, tokenizer, task, examples).right
        return {"seconds": time.perf_counter() - began, "right": right}

    race.serve(run)


# ------------------------------------------------------------------------------------------------ the race


def order_of(task, path: Path, examples: int) -> dict:
    """What both sides are asked: ours by the label, the reference by the rest."""
    meta = {"task_type": task.task_type, "num_fewshot": task.num_fewshot, "continuation_delimiter": task.delimiter}
    return {"label": task.label, "examples": examples, "file": str(path.resolve()), "task": meta}


def measure(sides: list[race.Side], order: dict, rounds: int) -> dict:
    """One task: {side: {"n", "seconds", "accuracy", ...}}, and on how many examples the sides agree."""
    first = sides[0].ask(order)
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 else reversed(sides):
            answer = side.ask(order)
            times[side.name].append(answer["seconds"])
            if side is sides[0]:
                assert answer["right"] == first["right"]
            else:
                theirs = answer["right"]
    n, out = len(first["right"]), {}
    for side in sides:
        right = first["right"] if side is sides[0] else theirs
        seconds = statistics.median(times[side.name])
        out[side.name] = {"n": n, "seconds": seconds, "examples_per_second": n / seconds, "accuracy": sum(right) / n}
    out["ours"]["first_seconds"] = first["seconds"]
    if len(sides) > 1:
        out["agree"] = sum(a == b for a, b in zip(first["right"], theirs, strict=True))
        out["ratio"] = out["reference"]["seconds"] / out["ours"]["seconds"]
    return out


def summary(found: dict[str, dict]) -> dict:
    """All tasks together: examples over seconds, of ours also with what the first pass compiles."""
    out: dict = {}
    for side in ("ours", "reference"):
        if mine := [task[side] for task in found.values() if side in task]:
            n, seconds = sum(t["n"] for t in mine), sum(t["seconds"] for t in mine)
            out[side] = {"examples": n, "seconds": seconds, "examples_per_second": n / seconds}
    out["ours"]["first_seconds"] = first = sum(task["ours"]["first_seconds"] for task in found.values())
    if "reference" in out:
        out["ratio"] = out["reference"]["seconds"] / out["ours"]["seconds"]
        out["ratio_with_compiling"] = out["reference"]["seconds"] / first
        out["tasks_of_equal_accuracy"] = sum(
            t["ours"]["accuracy"] == t["reference"]["accuracy"] for t in found.values()
        )
        out["examples_that_agree"] = sum(task["agree"] for task in found.values())
    return out


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    try:
        return compare(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace) -> int:
    tasks = found_tasks(args)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        tokenizer = tokenizer_of(args, folder / "tokenizer")
        args.vocab = tokenizer.vocab_size
        mine = [f"--{name}={getattr(args, name)}" for name in ("bundle", "depth", "vocab", "seq", "dtype")]
        mine += [f"--run-dir={args.run_dir}"] if args.run_dir else []
        mine += [f"--tokenizer={args.tokenizer or folder / 'tokenizer'}"]
        sides = [race.our_side("core", mine)]
        if args.reference:
            script, python, options = "reference_core.py", args.reference_python, prepare(args, tokenizer, folder)
            sides.append(race.reference_side(script, args.reference, python, args.dtype, options))
        race.begin(*sides)
        print(f"{'':34} {'examples':>8} {'accuracy':>8} {'ours/s':>8} {'first':>8}", end="")
        print(f" {'theirs/s':>8} {'ratio':>6} {'agree':>6}" if args.reference else "")
        found = {}
        for label, (task, path) in tasks.items():
            found[label] = one = measure(sides, order_of(task, path, args.examples), args.rounds)
            ours = one["ours"]
            line = f"{label:34} {ours['n']:8} {ours['accuracy']:8.3f} {ours['examples_per_second']:8.2f}"
            line += f" {ours['n'] / ours['first_seconds']:8.2f}"
            if args.reference:
                line += f" {one['reference']['examples_per_second']:8.2f} {one['ratio']:6.2f} {one['agree']:6}"
            print(line, flush=True)
        for side in sides:
            side.close()
    names = ("depth", "vocab", "seq", "dtype", "examples", "rounds", "run_dir")
    result = {"shape": {name: getattr(args, name) for name in names}, "all": summary(found), "tasks": found}
    print(json.dumps(result["all"], indent=1))
    print(json.dumps(result))
    return 0

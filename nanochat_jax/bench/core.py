"""CORE: examples per second, next to the PyTorch reference with the same weights where that is at hand.

Both sides score the same tokens in alternating rounds, and every answer is compared. Our time includes tokenizing, the
reference's does not. "first" is our first pass, which compiles; the other figures are medians of the later rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from evals.core import evaluate_task, fewshot_indices, load_examples, render_prompts
from evals.scoring import Scorer
from nanochat_jax.bench import decode, frame
from nanochat_jax.cli import positive
from nanochat_jax.config import MeshConfig, TokenizerConfig
from nanochat_jax.data.bundle import find_data, load_tasks
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.weights.names import to_reference
from tokenizer import load_tokenizer
from tokenizer.train import train_tokenizer

SAMPLE_CHARS = 5_000_000  # of the bundle's texts, for a tokenizer where none is given
LEAST = 11  # examples of a task, ten of which stand before the one asked
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--bundle", required=True, help="the folder of the CORE bundle")
    p.add_argument("--examples", type=positive, default=100, help=f"of a task, {LEAST} or more")
    p.add_argument("--tasks", help="labels, several after commas; default: all whose data are there")
    frame.add_model(p)
    p.add_argument("--tokenizer", help="the folder of one; default: one is trained on the bundle's texts")
    p.add_argument("--rounds", type=positive, default=1)
    frame.add_reference(p)


def found_tasks(args: argparse.Namespace) -> dict:
    """{label: (task, file)} of the tasks to run. UserError for a label that is not there."""
    bundle = Path(args.bundle)
    found = {task.label: (task, path) for task in load_tasks(bundle) if (path := find_data(bundle, task)[0])}
    chosen = [t.strip() for t in args.tasks.split(",")] if args.tasks else list(found)
    if unknown := [t for t in chosen if t not in found]:
        raise UserError(f"no data of {', '.join(unknown)} in {bundle}; there are {', '.join(found)}")
    return {label: found[label] for label in chosen}


def tokenizer_of(args: argparse.Namespace, tasks: dict, folder: Path) -> str:
    """The folder of the run's tokenizer, of the one named, or of one that is trained on the texts of the bundle."""
    if args.run_dir or args.tokenizer:
        return str(Path(args.run_dir, "tokenizer") if args.run_dir else args.tokenizer)
    texts = (line for _, path in tasks.values() for line in path.read_text(encoding="utf-8").splitlines())
    train_tokenizer(texts, folder, TokenizerConfig(args.vocab, SAMPLE_CHARS))
    return str(folder)


def prepare(args: argparse.Namespace, tasks: dict, tokenizer, folder: Path) -> dict:
    """Writes the weights by the reference's names and the ids of all prompts; the options that name them."""
    model, texts = decode.load(args), set()
    cfg = model.cfg
    if cfg.init != "modern":
        raise UserError("the reference runs the modern architecture only; take another --run-dir")
    weights, ids = folder / "weights.npz", folder / "ids.json"
    arrays: dict[str, Any] = to_reference(nnx.to_pure_dict(nnx.split(model)[1]), cfg)
    np.savez(weights, **arrays)
    for task, path in tasks.values():
        examples = load_examples(path, args.examples)
        for i, item in enumerate(examples):
            shots = [examples[j] for j in fewshot_indices(i, len(examples), task.num_fewshot)]
            texts.update(render_prompts(task.task_type, item, task.delimiter, shots))
    ids.write_text(json.dumps(dict(zip(texts, tokenizer.encode_batch(list(texts))))))
    sizes = {name: getattr(cfg, name) for name in SIZES}
    return {"weights": str(weights), "ids": str(ids), "sizes": sizes, "bos": tokenizer.bos}


def worker(args: argparse.Namespace) -> None:
    """Answers {"label", "examples"} with the seconds and whether each example was answered right."""
    scorer = Scorer(decode.load(args), mesh=sharding.make_mesh(MeshConfig()))
    tokenizer, tasks = load_tokenizer(args.tokenizer), found_tasks(args)

    def answer(order: dict) -> dict:
        task, path = tasks[order["label"]]
        examples = load_examples(path, order["examples"])
        began = time.perf_counter()
        right = evaluate_task(scorer, tokenizer, task, examples).right
        return {"seconds": time.perf_counter() - began, "right": right}

    frame.serve(answer)


def measure(sides: tuple[frame.Side, ...], order: dict, rounds: int) -> dict:
    """One task: {side: {"n", "seconds", "accuracy", ...}}, and on how many examples the sides agree."""
    first = sides[0].ask(order)
    answers = frame.in_turns(rounds, {side.name: partial(side.ask, order) for side in sides})
    assert all(answer["right"] == first["right"] for answer in answers["ours"])
    out: dict = {}
    for name, mine in answers.items():
        right, seconds = mine[-1]["right"], statistics.median(answer["seconds"] for answer in mine)
        n = len(right)
        out[name] = {"n": n, "seconds": seconds, "examples_per_second": n / seconds, "accuracy": sum(right) / n}
    out["ours"]["first_seconds"] = first["seconds"]
    if "reference" in out:
        theirs = answers["reference"][-1]["right"]
        out["agree"] = sum(a == b for a, b in zip(first["right"], theirs, strict=True))
        out["ratio"] = out["reference"]["seconds"] / out["ours"]["seconds"]
    return out


def summary(tasks: list[dict]) -> dict:
    """All tasks together: examples over seconds, of ours also with what the first pass compiles."""
    out: dict = {}
    for side in ("ours", "reference"):
        if mine := [task[side] for task in tasks if side in task]:
            n, seconds = sum(t["n"] for t in mine), sum(t["seconds"] for t in mine)
            out[side] = {"examples": n, "seconds": seconds, "examples_per_second": n / seconds}
    out["ours"]["first_seconds"] = first = sum(task["ours"]["first_seconds"] for task in tasks)
    if "reference" in out:
        out["ratio"] = out["reference"]["seconds"] / out["ours"]["seconds"]
        out["ratio_with_compiling"] = out["reference"]["seconds"] / first
        out["tasks_of_equal_accuracy"] = sum(t["ours"]["accuracy"] == t["reference"]["accuracy"] for t in tasks)
        out["examples_that_agree"] = sum(task["agree"] for task in tasks)
    return out


def run(args: argparse.Namespace) -> dict:
    if args.examples < LEAST:
        raise UserError(f"needs --examples of {LEAST} or more, ten of which stand before the one asked")
    tasks, found = found_tasks(args), {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        args.tokenizer = tokenizer_of(args, tasks, folder / "tokenizer")
        tokenizer = load_tokenizer(args.tokenizer)
        args.vocab = tokenizer.vocab_size
        theirs = prepare(args, tasks, tokenizer, folder) if args.reference else {}
        started = frame.ours("core", args), *frame.reference("core", args, args.dtype, **theirs)
        with frame.ready(*started) as sides:
            table = frame.Table()
            for label, (task, path) in tasks.items():
                meta = {"task_type": task.task_type, "num_fewshot": task.num_fewshot}
                order = {"label": label, "examples": args.examples, "file": str(path.resolve())}
                order["task"] = {**meta, "continuation_delimiter": task.delimiter}
                found[label] = one = measure(sides, order, args.rounds)
                beside = {k: one[k] for k in ("ratio", "agree") if k in one}
                beside |= {"theirs/s": one["reference"]["examples_per_second"]} if args.reference else {}
                table.row(label, one["ours"] | beside)
    shape = frame.shown(args, ("depth", "vocab", "seq", "dtype", "examples", "rounds", "run_dir"))
    whole = summary(list(found.values()))
    print(json.dumps(whole, indent=1))
    return {"shape": shape, "all": whole, "tasks": found}

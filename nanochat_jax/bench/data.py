"""Packing and loading: how fast rows are made, what they lose, and what reading them costs the training loop.

    python -m nanochat_jax.bench data --dir FOLDER
    python -m nanochat_jax.bench data --dir FOLDER --reference DIR --reference-python ENV/bin/python

FOLDER is what data.dir takes; without it the documents are those that stand on every machine. The reference tokenizes
and packs while it trains, so what its loader yields is compared with what ours reads from packed rows, in alternating
rounds. A step is simulated by sleeping: what then counts is how long the loop waits for its batch, and the processor
time of all of the loader's threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.bench import race

SEQ, BUFFER = 2048, 1000
CORES = 64  # of the machine that the hours are worked out for: one packs, the others tokenize
GOAL = 10_000_000_000  # tokens of rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench data", description=__doc__.split("\n\n")[0])
    p.add_argument("--dir", help="a folder of documents, the last file of which is for validation")
    p.add_argument("--tokenizer", help="the folder of one; default: one is trained on the beginning of the documents")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--sample-chars", type=int, default=10_000_000, help="that tokenizers are trained on")
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes that tokenize")
    p.add_argument("--rows", type=int, default=32, help="of a micro-batch")
    p.add_argument("--accumulation", type=int, default=8, help="micro-batches of a simulated step")
    p.add_argument("--step-seconds", type=float, default=0.5, help="that a simulated step takes")
    p.add_argument("--rounds", type=int, default=5)
    race.add_reference(p)
    p.add_argument("--packed", help=argparse.SUPPRESS)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------- packing


def tokenizer_of(args: argparse.Namespace, documents, folder: Path):
    from nanochat_jax.config import TokenizerConfig
    from tokenizer import load_tokenizer
    from tokenizer.train import train_tokenizer

    if args.tokenizer:
        return load_tokenizer(args.tokenizer)
    train_tokenizer(documents.train(), folder, TokenizerConfig(args.vocab, args.sample_chars))
    return load_tokenizer(folder)


def pack_all(documents, tok, folder: Path, workers: int, text_bytes: int) -> dict:
    """Packs the training documents here, so that what this process uses is the sequential part."""
    from nanochat_jax.data.ahead import Job, pack
    from nanochat_jax.data.packed import SHARD_ROWS, PackedDataset

    job = Job(folder, documents, "train", tok, SEQ + 1, BUFFER, None, SHARD_ROWS)
    began, used = time.perf_counter(), time.process_time()
    for line in pack(job, workers):
        print(f"{workers} workers: {line}")
    seconds, used = time.perf_counter() - began, time.process_time() - used
    made = PackedDataset(folder).manifest
    read = made["tokens"] + made["tokens_cropped"]
    return {
        "workers": workers,
        "seconds": seconds,
        "mb_per_second": text_bytes / seconds / 1e6,
        "tokens_per_second": read / seconds,
        "sequential_seconds": used,
        "sequential_tokens_per_second": made["tokens"] / used,
        "cropped": made["tokens_cropped"] / read,
        "rows": made["rows"],
        **_while_the_buffer_is_full(made),
    }


def _while_the_buffer_is_full(manifest: dict) -> dict:
    """Of all shards but the last, to compare with the reference: at the end that begins anew, and ours runs dry."""
    shards = manifest["shards"][:-1]
    tokens, cropped = (sum(shard[name] for shard in shards) for name in ("tokens", "tokens_cropped"))
    return {"full_rows": sum(s["rows"] for s in shards), "full_cropped": cropped / max(1, tokens + cropped)}


def hours(one: dict, sequential: float) -> dict:
    """Hours to GOAL tokens of rows on CORES cores like these: the longer of what tokenizes and what packs."""
    tokenizing = GOAL / (1 - one["cropped"]) / one["tokens_per_second"] / (CORES - 1) / 3600
    packing = GOAL / sequential / 3600
    return {"hours": max(tokenizing, packing), "tokenizing_hours": tokenizing, "packing_hours": packing}


# ------------------------------------------------------------------------------------------------- loading


def worker(args: argparse.Namespace) -> None:
    """Answers {"steps": n} with the seconds of n micro-batches, {"paced": n} with what n simulated steps cost."""
    import jax

    from nanochat_jax.config import MeshConfig
    from nanochat_jax.data.loader import Loader
    from nanochat_jax.data.packed import PackedDataset
    from nanochat_jax.mesh import sharding

    put = sharding.rows(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), leading=1)

    def opened(accumulation: int) -> Loader:
        return Loader(PackedDataset(args.packed), seed=0, accumulation=accumulation, rows=args.rows, sharding=put)

    with opened(1) as fast, opened(args.accumulation) as paced:
        done = {"steps": 0, "paced": 0}

        def run(order: dict):
            ((what, n),) = order.items()
            steps = range(done[what], done[what] + n)
            done[what] += n
            began, used, waited = time.perf_counter(), time.process_time(), 0.0
            for step in steps:
                asked = time.perf_counter()
                jax.block_until_ready((fast if what == "steps" else paced).at(step))
                waited += time.perf_counter() - asked
                if what == "paced":
                    time.sleep(args.step_seconds)
            if what == "steps":
                return time.perf_counter() - began
            return {"waited": waited, "used": time.process_time() - used, "seconds": time.perf_counter() - began}

        run({"steps": 20})
        run({"paced": 3})
        race.serve(run)


def lengths_of(documents, tok, folder: Path) -> Path:
    """A file of the tokens of each training document, with <|bos|>."""
    from nanochat_jax.data.ahead import Job, tokenize

    job = Job(folder, documents, "train", tok, SEQ + 1, BUFFER, None, 0)
    found = [np.asarray(message[0]) for message in tokenize(job, 0, 1, 0, 0) if message]
    np.save(folder / "lengths.npy", np.concatenate(found))
    return folder / "lengths.npy"


# ------------------------------------------------------------------------------------------------ the race


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    from nanochat_jax.config import DataConfig
    from nanochat_jax.data.sources import open_documents

    if args.reference and not args.dir:
        raise SystemExit("error: the reference reads parquet files; give their folder as --dir")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents = open_documents(DataConfig(dir=args.dir), folder)
        text_bytes = sum(len(text.encode()) for text in documents.train())
        tok = tokenizer_of(args, documents, folder / "tokenizer")
        packed = [pack_all(documents, tok, folder / str(n), n, text_bytes) for n in args.workers]
        one = packed[0]
        sequential = statistics.median(p["sequential_tokens_per_second"] for p in packed)
        result = {"seq": SEQ, "buffer": BUFFER, "text_mb": text_bytes / 1e6, "packing": packed}
        result |= {"sequential_tokens_per_second": sequential, **hours(one, sequential), "cropped": one["cropped"]}
        options = [f"--packed={folder / str(args.workers[0])}"]
        options += [f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("rows", "accumulation", "step-seconds")]
        sides = [race.our_side("data", options)]
        if args.reference:
            sides += _reference(args, documents, tok, folder, result)
        _race(args, race.begin(*sides), result)
    _print(args, result)
    return 0


def _reference(args: argparse.Namespace, documents, tok, folder: Path, result: dict) -> list[race.Side]:
    """Its loader, started; and what it crops of the rows that we have, with its tokenizer and with ours."""
    files = sorted(str(p.resolve()) for p in (Path(args.dir) / "pretrain").glob("*.parquet"))
    shape = {"rows": args.rows, "seq": SEQ, "vocab": args.vocab, "sample_chars": args.sample_chars}
    options = [f"--{name}={value}" for name, value in shape.items()] + ["--files", *files]

    def side(*more: str) -> race.Side:
        folder_, python = args.reference, args.reference_python
        return race.reference_side("reference_data.py", folder_, python, "float32", [*more, *options])

    rows = result["packing"][0]["full_rows"]
    if not rows:
        raise SystemExit("error: these documents make less than two shards of rows, too few to compare what is cropped")
    (ours,) = race.begin(side(f"--lengths={lengths_of(documents, tok, folder)}"))
    result["reference_cropped_our_tokenizer"] = ours.ask({"rows": rows})
    ours.close()
    (theirs,) = race.begin(side())
    result["reference_cropped"] = theirs.ask({"rows": rows})
    return [theirs]


def _race(args: argparse.Namespace, sides: list[race.Side], result: dict) -> None:
    rates, paced, n = {side.name: [] for side in sides}, [], {"ours": 200, "reference": 10}
    for _ in range(args.rounds):
        for side in sides:
            tokens = n[side.name] * args.rows * SEQ
            rates[side.name].append(tokens / side.ask({"steps": n[side.name]}))
        paced.append(sides[0].ask({"paced": 10}))
    for side in sides:
        mine = rates[side.name]
        result[side.name] = {"tokens_per_second": statistics.median(mine), "low": min(mine), "high": max(mine)}
        side.close()
    result["step"] = {
        "tokens": args.accumulation * args.rows * SEQ,
        "seconds": args.step_seconds,
        "waited_ms": 1e3 * statistics.median(p["waited"] for p in paced) / 10,
        "processor_ms": 1e3 * statistics.median(p["used"] for p in paced) / 10,
        "share_of_a_core": statistics.median(p["used"] / p["seconds"] for p in paced),
        "wait_share": statistics.median(p["waited"] / p["seconds"] for p in paced),
    }
    if len(sides) > 1:
        result["ratio"] = result["ours"]["tokens_per_second"] / result["reference"]["tokens_per_second"]


def _print(args: argparse.Namespace, result: dict) -> None:
    print(f"{'packing':12} {'MB/s':>7} {'tokens/s':>10} {'cropped':>8} {'sequential part, tokens/s':>26}")
    for p in result["packing"]:
        print(
            f"{p['workers']} workers{'':3} {p['mb_per_second']:7.2f} {p['tokens_per_second']:10,.0f} "
            f"{100 * p['cropped']:7.2f}% {p['sequential_tokens_per_second']:26,.0f}"
        )
    print(
        f"10 G tokens of rows on {CORES} cores like these: {result['hours']:.2f} hours (tokenizing on {CORES - 1} "
        f"{result['tokenizing_hours']:.2f}, packing on one {result['packing_hours']:.2f}; disk and memory keep up)"
    )
    if "reference_cropped" in result:
        print(
            f"cropped of the first {result['packing'][0]['full_rows']:,} rows: ours "
            f"{100 * result['packing'][0]['full_cropped']:.3f} %, the reference "
            f"{100 * result['reference_cropped_our_tokenizer']:.3f} % with our tokenizer and "
            f"{100 * result['reference_cropped']:.3f} % with its own"
        )
    print(f"{'loading':12} {'tokens/s':>12} {'lowest':>12} {'highest':>12}")
    for name in ("ours", "reference"):
        if name in result:
            r = result[name]
            print(f"{name:12} {r['tokens_per_second']:12,.0f} {r['low']:12,.0f} {r['high']:12,.0f}")
    s = result["step"]
    print(
        f"a step of {s['tokens']:,} tokens in {s['seconds']} s: the loop waits {s['waited_ms']:.2f} ms, all threads "
        f"use {s['processor_ms']:.2f} ms, {100 * s['share_of_a_core']:.2f} % of a core"
    )
    print(json.dumps(result))

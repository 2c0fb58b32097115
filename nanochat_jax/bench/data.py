"""Packing and loading: how fast rows are made, what they lose, and what reading them costs the training loop.

--dir is what data.dir takes. The reference tokenizes and packs while it trains, so its loader is compared with ours on
packed rows. A simulated step sleeps: what counts is the wait for the batch and the loader's processor time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from nanochat_jax.bench import frame
from nanochat_jax.cli import positive
from nanochat_jax.config import DataConfig, MeshConfig, TokenizerConfig
from nanochat_jax.data.loader import Loader
from nanochat_jax.data.packed import SHARD_ROWS, PackedDataset
from nanochat_jax.data.packer import Job, pack, tokenize
from nanochat_jax.data.sources import open_documents
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from tokenizer import load_tokenizer
from tokenizer.train import train_tokenizer

SEQ, BUFFER = 2048, 1000
CORES = 64  # of the machine that the hours are worked out for: one packs, the others tokenize
GOAL = 10_000_000_000  # tokens of rows
PACED = 10  # simulated steps of a round


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dir", help="a folder of documents, the last file of which is for validation")
    p.add_argument("--tokenizer", help="the folder of one; default: one is trained on the beginning of the documents")
    p.add_argument("--vocab", type=positive, default=32768)
    p.add_argument("--sample-chars", type=positive, default=10_000_000, help="characters to train tokenizers on")
    p.add_argument("--workers", type=positive, nargs="+", default=[1, 2], help="threads that tokenize")
    p.add_argument("--rows", type=positive, default=32, help="rows of a micro-batch")
    p.add_argument("--accumulation", type=positive, default=8, help="micro-batches of a simulated step")
    p.add_argument("--step-seconds", type=float, default=0.5, help="seconds of a simulated step")
    p.add_argument("--rounds", type=positive, default=5)
    frame.add_reference(p)


def pack_all(job: Job, workers: int, text_bytes: int) -> dict:
    """Packs the training documents here, so that what this thread uses is the sequential part.

    full_*: of all shards but the last, to compare with the reference: at the end that begins anew, and ours runs dry.
    """
    began, used = time.perf_counter(), time.thread_time()
    for line in pack(job, workers):
        print(f"{workers} workers: {line}")
    seconds, used = time.perf_counter() - began, time.thread_time() - used
    made = PackedDataset(job.folder).manifest
    full = made["shards"][:-1]
    rows, tokens, cropped = (sum(shard[name] for shard in full) for name in ("rows", "tokens", "tokens_cropped"))
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
        "full_rows": rows,
        "full_cropped": cropped / max(1, tokens + cropped),
    }


def worker(args: argparse.Namespace) -> None:
    """Answers {"steps": n} with the seconds of n micro-batches, {"paced": n} with what n simulated steps cost."""
    put = sharding.rows(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), leading=1)
    load = partial(Loader, PackedDataset(Path(args.packed)), seed=0, rows=args.rows, sharding=put)
    with load(accumulation=1) as fast, load(accumulation=args.accumulation) as paced:
        batches = {"steps": map(fast.at, itertools.count()), "paced": map(paced.at, itertools.count())}

        def answer(order: dict):
            ((what, n),) = order.items()
            began, used, waited = time.perf_counter(), time.process_time(), 0.0
            for _ in range(n):
                asked = time.perf_counter()
                jax.block_until_ready(next(batches[what]))
                waited += time.perf_counter() - asked
                if what == "paced":
                    time.sleep(args.step_seconds)
            seconds = time.perf_counter() - began
            return seconds if what == "steps" else [waited, time.process_time() - used, seconds]

        answer({"steps": 20})
        answer({"paced": 3})
        frame.serve(answer)


def cropped_by_reference(job: Job, rows: int, side) -> dict:
    """What the reference crops of the rows that we have, with our tokenizer and with its own."""
    if not rows:
        raise UserError("these documents make less than two shards of rows, too few to compare what is cropped")
    documents = tokenize(job.tok, list(job.documents.train()), job.row_len, threads=1)
    lengths = job.folder / "lengths.npy"  # of each document, with <|bos|>
    np.save(lengths, [length for length, _ in documents])
    out = {}
    for name, file in (("reference_cropped_our_tokenizer", str(lengths)), ("reference_cropped", None)):
        with frame.ready(*side(lengths=file)) as (theirs,):
            out[name] = theirs.ask({"rows": rows})
    return out


def run(args: argparse.Namespace) -> dict:
    if args.reference and not args.dir:
        raise UserError("the reference reads parquet files; give their folder as --dir")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents = open_documents(DataConfig(dir=args.dir), folder)
        text_bytes = sum(len(text.encode()) for text in documents.train())
        if not args.tokenizer:
            args.tokenizer = str(folder / "tokenizer")
            config = TokenizerConfig(args.vocab, args.sample_chars)
            train_tokenizer(documents.train(), Path(args.tokenizer), config)
        tok = load_tokenizer(args.tokenizer)
        packed, jobs, table = [], [], frame.Table()
        for workers in args.workers:
            job = Job(folder / str(workers), documents, "train", tok, SEQ + 1, BUFFER, None, SHARD_ROWS)
            jobs.append(job)
            packed.append(pack_all(job, workers, text_bytes))
            names = ("mb_per_second", "tokens_per_second", "cropped", "sequential_tokens_per_second")
            table.row(f"packing, {workers} workers", {name: packed[-1][name] for name in names})
        one, first = packed[0], jobs[0]
        sequential = statistics.median(p["sequential_tokens_per_second"] for p in packed)
        # hours to GOAL tokens of rows on CORES cores like these: the longer of what tokenizes and what packs
        tokenizing = GOAL / (1 - one["cropped"]) / one["tokens_per_second"] / (CORES - 1) / 3600
        packing = GOAL / sequential / 3600
        times = {"hours": max(tokenizing, packing), "tokenizing_hours": tokenizing, "packing_hours": packing}
        frame.Table().row(f"10 G tokens of rows on {CORES} cores", times)  # where disk and memory keep up
        result = {"seq": SEQ, "buffer": BUFFER, "text_mb": text_bytes / 1e6, "packing": packed, **times}
        result |= {"sequential_tokens_per_second": sequential, "cropped": one["cropped"]}
        files = sorted(str(p.resolve()) for p in Path(args.dir or "", "pretrain").glob("*.parquet"))
        side = partial(frame.reference, "data", args, "float32", seq=SEQ, files=files)
        if args.reference:
            cropped = cropped_by_reference(first, one["full_rows"], side)
            frame.Table().row(f"cropped of {one['full_rows']:,} rows", {"ours": one["full_cropped"], **cropped})
            result |= cropped
        with frame.ready(frame.ours("data", args, packed=str(first.folder)), *side(lengths=None)) as sides:
            return result | race(args, sides)


def race(args: argparse.Namespace, sides: tuple[frame.Side, ...]) -> dict:
    """Rates of both loaders, and what a simulated step costs with ours."""

    def measure(side: frame.Side) -> float:
        n = 200 if side.name == "ours" else 10
        return n * args.rows * SEQ / side.ask({"steps": n})

    turns = {side.name: partial(measure, side) for side in sides}
    rounds = frame.in_turns(args.rounds, {**turns, "step": partial(sides[0].ask, {"paced": PACED})})
    waited, used, seconds = np.asarray(rounds.pop("step")).T
    found = {name: frame.spread(rates) for name, rates in rounds.items()}
    table = frame.Table()
    for name, row in found.items():
        table.row(f"loading, {name}", row)
    found["step"] = {
        "tokens": args.accumulation * args.rows * SEQ,
        "seconds": args.step_seconds,
        "waited_ms": 1e3 * float(np.median(waited)) / PACED,
        "processor_ms": 1e3 * float(np.median(used)) / PACED,
        "share_of_a_core": float(np.median(used / seconds)),
        "wait_share": float(np.median(waited / seconds)),
    }
    frame.Table().row("a simulated step", found["step"])
    return found | frame.ratio(found)

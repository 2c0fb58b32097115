"""Decoding through the engine: prompts of one length answered as one batch, beside the reference where it is at hand.

    python -m nanochat_jax.bench decode --depth 4 --batch 1,8 --prompt 256 --new 128
    python -m nanochat_jax.bench decode --run-dir runs/demo --int8
    python -m nanochat_jax.bench decode --reference DIR --reference-python ENV/bin/python

Prompts are random and new in each round, so that nothing of them is in the cache. Prefill is the prompt's tokens over
the time to the first token of one prompt alone. "of memory" is the bytes that the steps of a second must read, weights
once and the keys and values in use, as a share of the rate that `read_bandwidth` finds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence

from nanochat_jax.bench import race


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench decode", description=__doc__.split("\n\n")[0])
    p.add_argument("--depth", type=int, default=4, help="of a model with random weights")
    p.add_argument("--run-dir", help="a trained one instead")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--seq", type=int, default=2048, help="the context that the cache has room for")
    p.add_argument("--batch", default="1,8,32", help="how many at once, several after commas; default 1,8,32")
    p.add_argument("--prompt", type=int, default=256, help="tokens")
    p.add_argument("--new", type=int, default=128, help="tokens")
    p.add_argument("--temperature", type=float, default=0.6)
    p.add_argument("--top-k", type=int, default=50)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--dtype", default="auto", help="float32 | bfloat16")
    p.add_argument("--int8", action="store_true", help="weights as int8")
    p.add_argument("--profile", metavar="DIR", help="trace an answer of the last batch into this folder")
    race.add_reference(p)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    try:
        args.batches = [int(b) for b in args.batch.split(",")]
    except ValueError:
        p.error(f"--batch {args.batch}: whole numbers with commas between them")
    if min(args.batches) < 1 or args.prompt < 2 or args.new < 2 or args.prompt + args.new > args.seq:
        p.error("needs --batch of 1 or more, --prompt and --new of 2 or more that fit --seq together")
    return args


# ------------------------------------------------------------------------------------------------ our side


def random_params(cfg) -> dict:
    """Fresh parameters with which outputs are not all alike."""
    import jax
    import jax.numpy as jnp

    from nanochat_jax.model.gpt import init_params

    params = init_params(cfg, 0)
    key = jax.random.key(1)
    for block in params["blocks"].values():  # these start at zero
        for part in (block["attn"]["proj"], block["mlp"]["proj"]):
            part["weight"] = 0.02 * jax.random.normal(key, part["weight"].shape, jnp.float32)
    params["lm_head"]["weight"] = 0.05 * jax.random.normal(key, params["lm_head"]["weight"].shape, jnp.float32)
    return params


def load(args: argparse.Namespace):
    """The model of a run, or one of random weights."""
    from nanochat_jax import devices
    from nanochat_jax.config import ModelConfig
    from nanochat_jax.model import scaling
    from nanochat_jax.model.gpt import graph_of, merge

    if args.run_dir:
        from nanochat_jax.checkpoint import load_model

        return load_model(args.run_dir).model
    cfg = scaling.gpt_config(ModelConfig(depth=args.depth, sequence_len=args.seq), args.vocab)
    return merge(graph_of(cfg, devices.compute_dtype(args.dtype)), random_params(cfg))


def step_bytes(engine, batch: int, length: int) -> int:
    """Bytes that a decode step of `batch` rows at `length` positions must read: weights, and what is seen of a row."""
    import jax

    cfg = engine.cfg
    products = {k: v for k, v in engine.params.items() if k in ("blocks", "lm_head")}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(products))
    seen = sum(min(length, window + 1) for window in cfg.windows)
    return weights + batch * seen * 2 * cfg.n_kv_head * cfg.head_dim * engine.dtype.itemsize


def read_bandwidth() -> float:
    """Bytes/s of this device's memory. A GPU adds 1 to 4 GB of float32 in place, read and written both counted; others
    read 256 MB for the maxima of their rows.

    256 MB pass in 0.1 ms on an H100, of which its caches hold a fifth, and a reduction there is bound by more than
    memory: it showed 1.7 of the 3.0 TB/s that a copy reaches.
    """
    import jax
    import jax.numpy as jnp

    gpu = jax.default_backend() == "gpu"
    matrix = jax.block_until_ready(jnp.ones((262144 if gpu else 16384, 4096)))
    add, reduce = jax.jit(lambda m: m + 1, donate_argnums=0), jax.jit(lambda m: m.max(axis=1))
    size, times = matrix.nbytes, []
    for _ in range(8):
        began = time.perf_counter()
        if gpu:
            matrix = jax.block_until_ready(add(matrix))
        else:
            reduce(matrix).block_until_ready()
        times.append(time.perf_counter() - began)
    return (2 if gpu else 1) * size / min(times)


def worker(args: argparse.Namespace) -> None:
    """Answers {"batch", "new"} with the seconds to the end of all, of which "bytes" tells the reading of a step; with
    {"profile"}, a folder, it also leaves a trace there."""
    import jax
    import numpy as np

    from nanochat_jax.engine.engine import Engine, Request

    model, engines, rng = load(args), {}, np.random.default_rng(0)

    def run(order):
        if order == "bandwidth":
            return read_bandwidth()
        batch, new = order["batch"], order["new"]
        if batch not in engines:
            engines.clear()  # one cache at a time
            engines[batch] = Engine(model, slots=batch, max_len=model.cfg.sequence_len, int8=args.int8)
        prompts = rng.integers(0, model.cfg.vocab_size, (batch, args.prompt)).tolist()
        asked = [Request(p, new, args.temperature, args.top_k, seed=i) for i, p in enumerate(prompts)]
        trace = jax.profiler.trace(order["profile"]) if "profile" in order else contextlib.nullcontext()
        with trace:
            began = time.perf_counter()
            done = engines[batch].generate(asked)
            seconds = time.perf_counter() - began
        assert all(len(c.ids) == new for c in done)
        return {"seconds": seconds, "bytes": step_bytes(engines[batch], batch, args.prompt + args.new // 2)}

    for batch in args.batches:
        run({"batch": batch, "new": args.new})
    race.compiled()
    race.serve(run)


# ------------------------------------------------------------------------------------------------ the race


def measure(side: race.Side, batch: int, args: argparse.Namespace) -> dict:
    """One round: tokens/s after the first token, seconds to it, bytes of a step where the side tells them."""
    first = side.ask({"batch": batch, "new": 1})
    whole = side.ask({"batch": batch, "new": args.new})
    seconds = whole["seconds"] - first["seconds"]
    return {"first": first["seconds"], "rate": batch * (args.new - 1) / seconds, "bytes": whole.get("bytes")}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(args)
        return 0
    names = ("depth", "vocab", "seq", "prompt", "new", "temperature", "top_k")
    shape = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    more = [f"--dtype={args.dtype}", f"--batch={args.batch}", *(["--int8"] if args.int8 else [])]
    more += [f"--run-dir={args.run_dir}"] if args.run_dir else []
    sides = [race.our_side("decode", [*shape, *more])]
    if args.reference:
        script, python = "reference_decode.py", args.reference_python
        sides.append(race.reference_side(script, args.reference, python, args.dtype, shape))
    race.begin(*sides)
    bandwidth = sides[0].ask("bandwidth")
    of_run = {"depth", "vocab", "seq"} if args.run_dir else set()  # which are the run's own
    result = {"shape": {n: getattr(args, n) for n in names if n not in of_run}, "run_dir": args.run_dir}
    result |= {"int8": args.int8, "rounds": args.rounds, "read_bandwidth_gb": bandwidth / 1e9, "batches": {}}
    print(f"{'batch':>5} {'':10} {'tokens/s':>9} {'a row':>8} {'first ms':>9} {'prefill/s':>9} {'of memory':>9}")
    for batch in args.batches:
        for side in sides:
            side.ask({"batch": batch, "new": args.new})  # a cache of this size
        rounds = [{side.name: measure(side, batch, args) for side in sides} for _ in range(args.rounds)]
        found = {}
        for side in sides:
            mine = [r[side.name] for r in rounds]
            rate, first = (statistics.median(m[k] for m in mine) for k in ("rate", "first"))
            row = {"tokens_per_second": rate, "first_seconds": first}
            share = "n/a"
            if mine[0]["bytes"]:
                row |= {"step_bytes": mine[0]["bytes"], "of_bandwidth": mine[0]["bytes"] * rate / batch / bandwidth}
                share = f"{row['of_bandwidth']:.0%}"
            prefill = f"{args.prompt / first:.0f}" if batch == 1 else ""
            if batch == 1:
                row["prefill_tokens_per_second"] = args.prompt / first
            print(
                f"{batch:5} {side.name:10} {rate:9.0f} {rate / batch:8.1f} {1e3 * first:9.1f} {prefill:>9} {share:>9}"
            )
            found[side.name] = row
        if len(sides) > 1:
            found["ratio"] = found["ours"]["tokens_per_second"] / found["reference"]["tokens_per_second"]
        result["batches"][str(batch)] = found
    if args.profile:
        sides[0].ask({"batch": args.batches[-1], "new": args.new, "profile": args.profile})
    for side in sides:
        side.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decoding through the engine: prompts of one length answered as one batch, next to the reference where it is at hand.

Prompts are random and new in each round, so the cache has nothing of them. Prefill is the prompt's tokens over the time
to the first token of a single prompt. of_bandwidth: bytes that a second's steps must read over `read_bandwidth`.
"""

import argparse
import contextlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import devices
from nanochat_jax.bench import frame
from nanochat_jax.bench.ops import copy_rate, fastest
from nanochat_jax.cli import positive
from nanochat_jax.config import ModelConfig
from nanochat_jax.engine.engine import Engine, Request
from nanochat_jax.errors import UserError
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of, init_params, merge


def options(p: argparse.ArgumentParser) -> None:
    frame.add_model(p)
    p.add_argument("--int8", action="store_true", help="weights as int8")
    p.add_argument("--batch", type=frame.numbers, default="1,8,32", help="batch sizes; default 1,8,32")
    p.add_argument("--prompt", type=positive, default=256, help="tokens of a prompt")
    p.add_argument("--new", type=positive, default=128, help="tokens of an answer")
    p.add_argument("--temperature", type=float, default=0.6)
    p.add_argument("--top-k", type=int, default=50)
    p.add_argument("--rounds", type=positive, default=5)
    p.add_argument("--profile", metavar="DIR", help="trace an answer of the last batch into this folder")
    frame.add_reference(p)


def _random_params(cfg) -> dict:
    """Fresh parameters with which outputs are not all alike, and every part of the architecture is at work."""
    params = init_params(cfg, 0)
    key = jax.random.key(1)
    for block in params["blocks"].values():  # these start at zero
        for part in (block["attn"]["proj"], block["mlp"]["proj"]):
            part["weight"] = 0.02 * jax.random.normal(key, part["weight"].shape, jnp.float32)
    params["lm_head"]["weight"] = 0.05 * jax.random.normal(key, params["lm_head"]["weight"].shape, jnp.float32)
    if "smear_lambda" in params:
        params["smear_lambda"] = params["smear_lambda"] + 0.5
    return params


def load(args: argparse.Namespace):
    if args.run_dir:
        from nanochat_jax.checkpoint import load_model

        return load_model(args.run_dir).model
    cfg = scaling.gpt_config(ModelConfig(depth=args.depth, sequence_len=args.seq), args.vocab)
    return merge(graph_of(cfg, devices.compute_dtype(args.dtype)), _random_params(cfg))


def step_bytes(engine: Engine, batch: int, length: int) -> int:
    """Bytes that a decode step of `batch` rows at `length` positions must read: weights, and what is seen of a row."""
    cfg = engine.cfg
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((engine.params["blocks"], engine.params["lm_head"])))
    seen = sum(min(length, window + 1) for window in cfg.windows)
    return weights + batch * seen * 2 * cfg.n_kv_head * cfg.head_dim * engine.dtype.itemsize


def read_bandwidth() -> float:
    """Bytes/s of this device's memory: of a copy on a GPU, else of reading 256 MB for the maxima of their rows."""
    if jax.default_backend() == "gpu":
        # of 256 MB an H100's caches hold a fifth, and a reduction reaches half a copy's rate
        return copy_rate(4 << 30)
    matrix, reduce = jnp.ones((16384, 4096)), jax.jit(lambda m: m.max(axis=1))
    return matrix.nbytes / fastest(lambda: reduce(matrix))


def worker(args: argparse.Namespace) -> None:
    """Answers {"batch", "new"} with the seconds to the end of all and the bytes that a step reads, "bandwidth" with the
    memory's; a trace goes into the folder {"profile"}."""
    model, rng = load(args), np.random.default_rng(0)
    engines: dict[int, Engine] = {}

    def answer(order):
        if order == "bandwidth":
            return read_bandwidth()
        batch, new = order["batch"], order["new"]
        if batch not in engines:
            engines.clear()  # one cache at a time
            engines[batch] = Engine(model, slots=batch, max_len=model.cfg.sequence_len, int8=args.int8)
        prompts = rng.integers(0, model.cfg.vocab_size, (batch, args.prompt)).tolist()
        asked = [Request(p, new, args.temperature, args.top_k, seed=i) for i, p in enumerate(prompts)]
        with jax.profiler.trace(order["profile"]) if "profile" in order else contextlib.nullcontext():
            began = time.perf_counter()
            done = engines[batch].generate(asked)
            seconds = time.perf_counter() - began
        assert all(len(c.ids) == new for c in done)
        return {"seconds": seconds, "bytes": step_bytes(engines[batch], batch, args.prompt + args.new // 2)}

    for batch in args.batch:
        for new in (1, args.new):
            answer({"batch": batch, "new": new})
    frame.serve(answer)


def measure(side: frame.Side, batch: int, args: argparse.Namespace) -> dict:
    """One round: tokens/s after the first token, seconds to it, bytes of a step where the side tells them."""
    first = side.ask({"batch": batch, "new": 1})["seconds"]
    whole = side.ask({"batch": batch, "new": args.new})
    rate = batch * (args.new - 1) / (whole["seconds"] - first)
    return {"rate": rate, "first": first, "bytes": whole.get("bytes")}


def run(args: argparse.Namespace) -> dict:
    if args.prompt < 2 or args.new < 2 or args.prompt + args.new > args.seq:
        raise UserError("needs --prompt and --new of 2 or more that fit --seq together")
    of_model = () if args.run_dir else ("depth", "vocab", "seq")
    shape = frame.shown(args, (*of_model, "prompt", "new", "temperature", "top_k"))
    with frame.ready(frame.ours("decode", args), *frame.reference("decode", args, args.dtype)) as sides:
        bandwidth = sides[0].ask("bandwidth")
        result = {"shape": shape, **frame.shown(args, ("run_dir", "int8", "rounds"))}
        result |= {"read_bandwidth_gb": bandwidth / 1e9, "batches": {}}
        table = frame.Table()
        for batch in args.batch:
            for side in sides:
                measure(side, batch, args)  # makes a cache of this size
            rounds = frame.in_turns(args.rounds, {s.name: partial(measure, s, batch, args) for s in sides})
            found = {}
            for name, mine in rounds.items():
                rate, first = (statistics.median(r[k] for r in mine) for k in ("rate", "first"))
                found[name] = {"tokens_per_second": rate, "first_seconds": first}
                if size := mine[0]["bytes"]:
                    found[name] |= {"step_bytes": size, "of_bandwidth": size * rate / batch / bandwidth}
                if batch == 1:
                    found[name]["prefill_tokens_per_second"] = args.prompt / first
                table.row(f"{name}, batch {batch}", found[name])
            result["batches"][str(batch)] = found | frame.ratio(found)
        if args.profile:
            sides[0].ask({"batch": args.batch[-1], "new": args.new, "profile": args.profile})
    return result

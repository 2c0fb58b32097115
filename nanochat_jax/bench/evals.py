"""Answering an evaluation's questions all together, beside one after the other.

    python -m nanochat_jax.bench evals --run-dir runs/demo
    python -m nanochat_jax.bench evals --run-dir runs/demo --context 1024 --dir DATA --task gsm8k

With --context the model is one of the run's shape with fresh weights and so long a context that every question with its
answer fits, and nothing stops an answer early: all have --new tokens. Without it the run's own model answers as it does
in its evaluation. One after the other is the same engine with one slot; it answers the first --few questions, in rounds
that alternate with those of all together. DATA is what data.dir takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanochat_jax.bench import race


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench evals", description=__doc__.split("\n\n")[0])
    p.add_argument("--run-dir", required=True, help="whose tokenizer, shape and model are used")
    p.add_argument("--stage", help="default: the latest that has ended")
    p.add_argument("--context", type=int, help="fresh weights, with a context of so many tokens")
    p.add_argument("--task", default="arithmetic", help="a task whose answers are generated")
    p.add_argument("--dir", help="the data folder that holds the task")
    p.add_argument("--questions", type=int, default=200)
    p.add_argument("--few", type=int, default=20, help="that are answered one after the other")
    p.add_argument("--new", type=int, default=256, help="tokens of an answer, at most")
    p.add_argument("--slots", default="32", help="most answers at a time, several after commas; a CPU takes 8 a core")
    p.add_argument("--engines", type=int, help="of a CPU; default: one a core")
    p.add_argument("--rounds", type=int, default=5)
    return p.parse_args(argv)


def prepare(args: argparse.Namespace):
    """(model, tokenizer, requests)."""
    from evals.chat import pick
    from evals.tasks import load_task
    from evals.tasks.base import prompt_messages
    from nanochat_jax.bench import decode
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.engine.engine import Request
    from nanochat_jax.model.gpt import graph_of, merge
    from tokenizer.chat import render_prompt

    loaded = load_model(args.run_dir, args.stage)
    model, tok = loaded.model, loaded.tokenizer
    stop = (tok.assistant_end, tok.bos)
    if args.context:
        cfg, stop = replace(model.cfg, sequence_len=args.context), ()
        model = merge(graph_of(cfg, model.dtype), decode.random_params(cfg))
    data = replace(loaded.config.data, **({"dir": args.dir, "source": "local"} if args.dir else {}))
    cache_dir = Path(loaded.config.data.cache_dir or Path(args.run_dir).parent / "cache")
    task = load_task(args.task, split="test", data=data, cache_dir=cache_dir)
    prompts = [render_prompt(tok, prompt_messages(task[i])) for i in pick(len(task), args.questions)]
    fit = [p for p in prompts if len(p) < model.cfg.sequence_len]
    return model, tok, [Request(p, args.new, temperature=0.0, stop_ids=stop) for p in fit]


def measure(answer, requests) -> dict:
    """Seconds, and tokens that were generated."""
    began = time.perf_counter()
    done = answer(requests)
    return {"seconds": time.perf_counter() - began, "tokens": sum(len(c.ids) for c in done)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from evals.engines import Engines
    from nanochat_jax.engine.calculator import CalculatorTool

    model, tok, requests = prepare(args)
    how = {"max_len": model.cfg.sequence_len, "tool": CalculatorTool(tok)}
    one = Engines(model, slots=1, **how)
    ways = {"1": lambda asked: [c for r in asked for c in one.generate([r])]}
    for slots in args.slots.split(","):
        ways[slots] = Engines(model, slots=int(slots), count=args.engines, **how).generate
    asked = {name: requests[: args.few] if name == "1" else requests for name in ways}
    first = {name: measure(answer, asked[name]) for name, answer in ways.items()}
    race.wait_for_turn()
    rounds = [{name: measure(answer, asked[name]) for name, answer in ways.items()} for _ in range(args.rounds)]
    lengths = [len(r.ids) for r in requests]
    print(f"{len(requests)} questions of {args.task}, prompts of {min(lengths)} to {max(lengths)} tokens")
    print(f"{'slots':>5} {'tokens/s':>9} {'a question':>11} {'of one':>7} {'first round':>12}")
    result = {"task": args.task, "questions": len(requests), "new": args.new, "context": model.cfg.sequence_len}
    result["slots"] = {}
    for name in ways:
        rate = statistics.median(r[name]["tokens"] / r[name]["seconds"] for r in rounds)
        seconds = statistics.median(r[name]["seconds"] for r in rounds) / len(asked[name])
        ratio = statistics.median(
            r[name]["tokens"] / r[name]["seconds"] / (r["1"]["tokens"] / r["1"]["seconds"]) for r in rounds
        )
        compiling = first[name]["seconds"]
        print(f"{name:>5} {rate:9.0f} {1e3 * seconds:8.1f} ms {ratio:7.2f} {compiling:10.1f} s")
        result["slots"][name] = {"tokens_per_second": rate, "seconds_per_question": seconds, "of_one": ratio}
        result["slots"][name] |= {"tokens": rounds[0][name]["tokens"], "first_seconds": compiling}
    print(json.dumps(result))
    return 0

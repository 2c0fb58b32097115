"""Answering an evaluation's questions in batches, next to one after the other.

The run's own model answers as in its evaluation. With --context fresh weights do, with so long a context that every
question fits, and nothing stops an answer early: all have --new tokens. One after the other is the same engine with one
slot, for the first --few questions, in alternating rounds. --dir is what data.dir takes.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from evals.chat import pick
from evals.engines import Engines
from evals.tasks import load_task
from evals.tasks.base import prompt_messages
from nanochat_jax.bench import frame
from nanochat_jax.bench.decode import random_params
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import positive
from nanochat_jax.engine.engine import Request
from nanochat_jax.engine.tools import Tools
from nanochat_jax.model.gpt import graph_of, merge
from tokenizer.chat import render_prompt


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run-dir", required=True, help="the run whose tokenizer, shape and model are used")
    p.add_argument("--stage", help="default: the latest finished stage")
    p.add_argument("--context", type=positive, help="use fresh weights, with a context of this many tokens")
    p.add_argument("--task", default="arithmetic", help="a task whose answers are generated")
    p.add_argument("--dir", help="the data folder that holds the task")
    p.add_argument("--questions", type=positive, default=200)
    p.add_argument("--few", type=positive, default=20, help="questions that are answered one after the other")
    p.add_argument("--new", type=positive, default=256, help="tokens of an answer, at most")
    p.add_argument("--slots", type=frame.numbers, default="32", help="answers in parallel; a CPU takes 8 per core")
    p.add_argument("--engines", type=positive, help="engines on a CPU; default: one per core")
    p.add_argument("--rounds", type=positive, default=5)


def prepare(args: argparse.Namespace):
    """(model, tokenizer, requests)."""
    loaded = load_model(args.run_dir, args.stage)
    model, tok = loaded.model, loaded.tokenizer
    stop: tuple[int, ...] = (tok.assistant_end, tok.bos)
    if args.context:
        cfg, stop = replace(model.cfg, sequence_len=args.context), ()
        model = merge(graph_of(cfg, model.dtype), random_params(cfg))
    data = replace(loaded.config.data, **({"dir": args.dir, "source": "local"} if args.dir else {}))
    cache_dir = Path(loaded.config.data.cache_dir or Path(args.run_dir).parent / "cache")
    task = load_task(args.task, split="test", data=data, cache_dir=cache_dir)
    prompts = [render_prompt(tok, prompt_messages(task[i])) for i in pick(len(task), args.questions)]
    fit = [p for p in prompts if len(p) < model.cfg.sequence_len]
    return model, tok, [Request(p, args.new, temperature=0.0, stop_ids=stop) for p in fit]


def measure(answer, requests: list[Request]) -> tuple[float, int]:
    """Seconds, and tokens that were generated."""
    began = time.perf_counter()
    done = answer(requests)
    return time.perf_counter() - began, sum(len(c.ids) for c in done)


def run(args: argparse.Namespace) -> dict:
    model, tok, requests = prepare(args)
    engines = partial(Engines, model, max_len=model.cfg.sequence_len, tool=Tools(tok))
    one, few = engines(slots=1), requests[: args.few]
    sides = {"1": partial(measure, lambda asked: [c for r in asked for c in one.generate([r])], few)}
    for slots in args.slots:
        sides[str(slots)] = partial(measure, engines(slots=slots, count=args.engines).generate, requests)
    first = frame.in_turns(1, sides)
    frame.wait_for_turn()
    rounds = frame.in_turns(args.rounds, sides)
    rates = {name: [tokens / seconds for seconds, tokens in mine] for name, mine in rounds.items()}
    lengths = [len(r.ids) for r in requests]
    print(f"{len(requests)} questions of {args.task}, prompts of {min(lengths)} to {max(lengths)} tokens")
    table, found = frame.Table(), {}
    for name, mine in rounds.items():
        rate = statistics.median(rates[name])
        seconds = statistics.median(s for s, _ in mine) / len(few if name == "1" else requests)
        of_one = statistics.median(a / b for a, b in zip(rates[name], rates["1"]))
        ((compiling, _),) = first[name]
        found[name] = {"tokens_per_second": rate, "seconds_per_question": seconds, "of_one": of_one}
        found[name] |= {"tokens": mine[0][1], "first_seconds": compiling}
        table.row(f"slots {name}", found[name])
    shape = {"task": args.task, "questions": len(requests), "new": args.new, "context": model.cfg.sequence_len}
    return {**shape, "slots": found}

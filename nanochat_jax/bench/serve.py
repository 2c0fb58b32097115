"""Many clients at once, each of which asks again when it has its answer: latency and throughput.

Without --url the clients sit in this process and talk to the engine, without HTTP and text. With it they stream chat
completions from a running server, and an answer that breaks off or has no end counts as an error.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import sys
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from nanochat_jax.bench import frame
from nanochat_jax.bench.decode import load
from nanochat_jax.cli import positive
from nanochat_jax.engine.engine import Engine, Request
from nanochat_jax.errors import UserError

QUESTIONS = (
    "Who are you?",
    "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?",
    "What is the capital of France? Answer in one sentence.",
    "How many times does the letter r occur in strawberry?",
    "Write a short story about a dog that finds a blue stone at the beach.",
)
TOKENS = (24, 48, 96, 192)  # the limits that clients ask for


class Answer(NamedTuple):
    first: float  # seconds to the first token
    whole: float  # seconds to the end
    tokens: int


# (clients, seconds) -> whole answers and errors
Clients = Callable[[int, float], tuple[list[Answer], list[str]]]


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--url", help="a running server; its key in NANOCHAT_API_KEY where it wants one")
    frame.add_model(p)
    p.add_argument("--int8", action="store_true", help="weights as int8")
    p.add_argument("--slots", type=positive, default=32)
    p.add_argument("--prompt", type=positive, default=64, help="tokens of a prompt at most, without --url")
    p.add_argument("--clients", type=frame.numbers, default="1,8,32", help="clients in parallel; default 1,8,32")
    p.add_argument("--seconds", type=float, default=20.0, help="duration of each run")


def in_process(args: argparse.Namespace) -> Clients:
    model = load(args)
    engine = Engine(model, slots=args.slots, max_len=model.cfg.sequence_len, int8=args.int8)
    longest = max(2, min(args.prompt, engine.max_len - max(TOKENS)))

    def request(rng: random.Random) -> Request:
        ids = [rng.randrange(model.cfg.vocab_size) for _ in range(rng.randint(2, longest))]
        return Request(ids, rng.choice(TOKENS), temperature=0.6, top_k=50, seed=rng.randrange(2**31))

    def run(clients: int, seconds: float) -> tuple[list[Answer], list[str]]:
        answers, asked = [], {}

        def ask(rng: random.Random) -> None:
            times: list[float] = []  # from asking to each event that brings tokens
            asked[engine.submit(request(rng))] = (rng, time.perf_counter(), times)

        for client in range(clients):
            ask(random.Random(client))
        end = time.perf_counter() + seconds
        while engine.busy:
            for event in engine.step():
                rng, began, times = asked[event.ticket]
                now = time.perf_counter()
                if event.ids:
                    times.append(now - began)
                if event.completion is not None:
                    answers.append(Answer(times[0], now - began, len(event.completion.ids)))
                    del asked[event.ticket]
                    if now < end:
                        ask(rng)
        return answers, []

    return run


def over_http(url: str) -> Clients:
    """Clients of a server: a thread for each, a connection for each answer."""
    place = urllib.parse.urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("NANOCHAT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def answer(rng: random.Random) -> Answer:
        """Anything but a whole answer raises."""
        body = {
            "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": rng.choice(TOKENS),
            "seed": rng.randrange(2**31),
        }
        began, first, tokens, reason = time.perf_counter(), None, 0, None
        server = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
        with contextlib.closing(server) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.read(200)!r}")
            for line in response:
                now = time.perf_counter() - began
                if line.strip() == b"data: [DONE]":
                    if reason is None:
                        raise ValueError("an answer without a finish_reason")
                    return Answer(first or now, now, tokens)
                if not line.startswith(b"data: "):
                    continue
                part = json.loads(line[6:])
                if "error" in part:
                    raise ValueError(part["error"]["message"])
                for choice in part["choices"]:
                    if first is None and (choice["delta"].get("content") or choice["delta"].get("tool")):
                        first = now
                    reason = choice["finish_reason"] or reason
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
        raise ValueError("the stream broke off")

    def run(clients: int, seconds: float) -> tuple[list[Answer], list[str]]:
        answers: list[Answer] = []
        errors: list[str] = []
        end = time.perf_counter() + seconds

        def client(number: int) -> None:
            rng = random.Random(number)
            while time.perf_counter() < end:
                try:
                    answers.append(answer(rng))
                except (OSError, ValueError, http.client.HTTPException) as e:
                    errors.append(f"{type(e).__name__}: {e}")
                    time.sleep(0.1)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        return answers, errors

    return run


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in seconds, each one that was seen; empty where there is none."""
    points = (50, 95, 99)
    found = np.percentile(values, points, method="higher").tolist() if values else []
    return {f"p{p}": value for p, value in zip(points, found)}


def run(args: argparse.Namespace) -> dict:
    if args.prompt < 2 or args.seconds <= 0:
        raise UserError("needs --prompt of 2 or more, --seconds above 0")
    ask, found = over_http(args.url) if args.url else in_process(args), {}
    table = frame.Table()
    for clients in args.clients:
        ask(clients, min(5.0, args.seconds))  # compiles
        began = time.perf_counter()
        answers, errors = ask(clients, args.seconds)
        rate = sum(a.tokens for a in answers) / (time.perf_counter() - began)
        row = {"answers": len(answers), "errors": len(errors), "tokens_per_second": rate}
        waits = {"first_token_seconds": percentiles([a.first for a in answers])}
        waits["answer_seconds"] = percentiles([a.whole for a in answers])
        ms = {f"{k} ms": "/".join(f"{1e3 * s:.0f}" for s in v.values()) for k, v in waits.items()}
        table.row(f"clients {clients}", row | ms)
        found[str(clients)] = row | waits
        for message in sorted(set(errors))[:5]:
            print(f"        {errors.count(message)} x {message}", file=sys.stderr)
    return {"where": args.url or "in process", "slots": None if args.url else args.slots, "clients": found}

"""Many clients at once, each of which asks again when it has its answer: latency and throughput.

    python -m nanochat_jax.bench serve --depth 4 --clients 1,8,32
    python -m nanochat_jax.bench serve --url http://127.0.0.1:8000 --clients 1,32 --seconds 300

Without --url the clients sit in this process and talk to the engine: its own figures, without HTTP and text. With --url
they stream chat completions from a running server, and an answer that breaks off or has no end counts as an error.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

QUESTIONS = (
    "Who are you?",
    "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?",
    "What is the capital of France? Answer in one sentence.",
    "How many times does the letter r occur in strawberry?",
    "Write a short story about a dog that finds a blue stone at the beach.",
)
TOKENS = (24, 48, 96, 192)  # the limits that clients ask for


@dataclass
class Tally:
    """What the clients of one run saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    whole: list[float] = field(default_factory=list)  # seconds to the end
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench serve", description=__doc__.split("\n\n")[0])
    p.add_argument("--url", help="a running server; its key in NANOCHAT_API_KEY where it wants one")
    p.add_argument("--depth", type=int, default=4, help="of a model with random weights")
    p.add_argument("--run-dir", help="a trained one instead")
    p.add_argument("--vocab", type=int, default=32768)
    p.add_argument("--seq", type=int, default=2048, help="the context that the cache has room for")
    p.add_argument("--dtype", default="auto", help="float32 | bfloat16")
    p.add_argument("--int8", action="store_true", help="weights as int8")
    p.add_argument("--slots", type=int, default=32)
    p.add_argument("--prompt", type=int, default=64, help="tokens of a prompt at most, without --url")
    p.add_argument("--clients", default="1,8,32", help="several after commas; default 1,8,32")
    p.add_argument("--seconds", type=float, default=20.0, help="of each run")
    args = p.parse_args(argv)
    try:
        args.counts = [int(c) for c in args.clients.split(",")]
    except ValueError:
        p.error(f"--clients {args.clients}: whole numbers with commas between them")
    if min(args.counts) < 1 or args.slots < 1 or args.prompt < 2 or args.seconds <= 0:
        p.error("needs --clients and --slots of 1 or more, --prompt of 2 or more, --seconds above 0")
    return args


# ------------------------------------------------------------------------------------------ clients in this process


def in_process(args: argparse.Namespace) -> Callable[[int, float], Tally]:
    """run(clients, seconds) against an engine of this process."""
    from nanochat_jax.bench.decode import load
    from nanochat_jax.engine.engine import Engine, Request

    model = load(args)
    engine = Engine(model, slots=args.slots, max_len=model.cfg.sequence_len, int8=args.int8)
    longest = max(2, min(args.prompt, engine.max_len - max(TOKENS)))

    def request(rng: random.Random) -> Request:
        ids = [rng.randrange(model.cfg.vocab_size) for _ in range(rng.randint(2, longest))]
        return Request(ids, rng.choice(TOKENS), temperature=0.6, top_k=50, seed=rng.randrange(2**31))

    def run(clients: int, seconds: float) -> Tally:
        rngs, tally, asked = [random.Random(i) for i in range(clients)], Tally(), {}

        def ask(client: int) -> None:
            asked[engine.submit(request(rngs[client]))] = (client, time.perf_counter())

        for client in range(clients):
            ask(client)
        end = time.perf_counter() + seconds
        while engine.busy:
            for event in engine.step():
                client, began = asked[event.ticket]
                now = time.perf_counter()
                if event.ids and len(event.ids) == len(event.ticket.completion.ids):
                    tally.first.append(now - began)
                tally.tokens += len(event.ids)
                if event.completion is not None:
                    tally.whole.append(now - began)
                    del asked[event.ticket]
                    if now < end:
                        ask(client)
        return tally

    return run


# -------------------------------------------------------------------------------------------- clients over HTTP


def over_http(url: str) -> Callable[[int, float], Tally]:
    """run(clients, seconds) against a server: a thread for each client, a connection for each answer."""
    place = urllib.parse.urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("NANOCHAT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def answer(rng: random.Random) -> tuple[float, float, int]:
        """(seconds to the first piece, to the end, tokens). Anything but a whole answer raises."""
        body = {
            "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": rng.choice(TOKENS),
            "seed": rng.randrange(2**31),
        }
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=120)
        try:
            began, first, tokens, reason = time.perf_counter(), None, 0, None
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.read(200)!r}")
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    if reason is None:
                        raise ValueError("an answer without a finish_reason")
                    now = time.perf_counter() - began
                    return (now if first is None else first), now, tokens
                part = json.loads(line[6:])
                if "error" in part:
                    raise ValueError(part["error"]["message"])
                for choice in part["choices"]:
                    if first is None and ({"content", "tool"} & {k for k, v in choice["delta"].items() if v}):
                        first = time.perf_counter() - began
                    reason = choice["finish_reason"] or reason
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            raise ValueError("the stream broke off")
        finally:
            connection.close()

    def run(clients: int, seconds: float) -> Tally:
        tally, lock, end = Tally(), threading.Lock(), time.perf_counter() + seconds

        def client(number: int) -> None:
            rng = random.Random(number)
            while time.perf_counter() < end:
                try:
                    first, whole, tokens = answer(rng)
                except (OSError, ValueError, http.client.HTTPException) as e:
                    with lock:
                        tally.errors.append(f"{type(e).__name__}: {e}")
                    time.sleep(0.1)
                    continue
                with lock:
                    tally.first.append(first)
                    tally.whole.append(whole)
                    tally.tokens += tokens

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return tally

    return run


# ------------------------------------------------------------------------------------------------- the table


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 (nearest rank) in seconds; empty where there is none."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99) if ordered}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    run = over_http(args.url) if args.url else in_process(args)
    result = {"where": args.url or "in process", "slots": None if args.url else args.slots, "clients": {}}
    print(
        f"{'clients':>7} {'answers':>8} {'errors':>7} {'tokens/s':>9}  first token ms p50/95/99   answer ms p50/95/99"
    )
    for clients in args.counts:
        run(clients, min(5.0, args.seconds))  # compiles
        began = time.perf_counter()
        tally = run(clients, args.seconds)
        rate = tally.tokens / (time.perf_counter() - began)
        first, whole = percentiles(tally.first), percentiles(tally.whole)
        shown = [" / ".join(f"{1e3 * v:.0f}" for v in kind.values()) for kind in (first, whole)]
        print(f"{clients:7} {len(tally.whole):8} {len(tally.errors):7} {rate:9.0f}  {shown[0]:>24}   {shown[1]:>20}")
        row = {"answers": len(tally.whole), "errors": len(tally.errors), "tokens_per_second": rate}
        result["clients"][str(clients)] = row | {"first_token_seconds": first, "answer_seconds": whole}
        for message in sorted(set(tally.errors))[:5]:
            print(f"        {tally.errors.count(message)} x {message}", file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

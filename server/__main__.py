"""Serves a trained model.

NANOCHAT_API_KEY in the environment is the key that /v1 and /metrics want as a bearer token; without it they are open.
"""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanochat_jax import processes
from nanochat_jax.cli import command
from nanochat_jax.errors import UserError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m server", description=__doc__.split("\n\n")[0])
    p.add_argument("--run-dir", required=True, help="the run directory")
    p.add_argument("--stage", help="base, mid, sft or rl; default: the latest that has ended")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be seen from other machines")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--slots", type=int, default=32, help="answers that are made at the same time; default 32")
    p.add_argument("--max-waiting", type=int, default=64, help="answers that may wait for a slot; default 64")
    p.add_argument("--int8", action="store_true", help="weights as 8-bit integers: half the memory, nearly the same")
    p.add_argument("--cors-origin", action="append", default=[], help="an origin whose pages may call; repeatable")
    p.add_argument("--strict", action="store_true", help="refuse fields that are not known, which are left out else")
    return p.parse_args(argv)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. UserError where the address is taken or none of this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as e:
        raise UserError(f"cannot listen on {host}:{port} ({e}); take another --port or --host") from None
    return found


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    for name, value, least in (("--slots", args.slots, 1), ("--max-waiting", args.max_waiting, 0)):
        if value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    listening = bind(args.host, args.port)

    import jax
    import uvicorn

    # the engine's thread wants the interpreter for a moment many times a step: Python would let it wait 5 ms for each
    sys.setswitchinterval(0.0005)

    from evals import records
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.config import MeshConfig
    from nanochat_jax.devices import prepare, use_compilation_cache
    from nanochat_jax.engine.engine import Engine, Request
    from nanochat_jax.engine.grammar import Vocabulary
    from nanochat_jax.engine.tools import Tools
    from nanochat_jax.mesh.sharding import make_mesh
    from server.app import create_app
    from server.scheduler import Scheduler

    prepare()
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    loaded = load_model(args.run_dir, args.stage, mesh=mesh)
    run = Path(args.run_dir).absolute()
    use_compilation_cache(run.parent / "cache" / "compiled")
    length, tok = loaded.model.cfg.sequence_len, loaded.tokenizer
    slots = -(-args.slots // jax.device_count()) * jax.device_count()  # each device has as many
    engine = Engine(loaded.model, slots=slots, max_len=length, tool=Tools(tok), mesh=mesh, int8=args.int8)
    usual = Request([tok.bos] * 2, 1, top_k=50)
    engine.generate([usual])  # compiles, so that the first visitor need not wait
    formed = replace(usual, grammar=Vocabulary(tok).json({}))
    likely = [usual, replace(usual, temperature=0.0), formed, replace(formed, temperature=0.0)]
    scheduler = Scheduler(engine, args.max_waiting, likely)
    about = {"run": run.name, "stage": loaded.stage, "suggestions": records.suggestions(run, loaded.stage)}
    key = os.environ.get("NANOCHAT_API_KEY")
    app = create_app(scheduler, tok, about, api_key=key, cors_origins=args.cors_origin, strict=args.strict)
    host, port = listening.getsockname()[:2]
    at = f"[{host}]" if ":" in host else host
    print(f"{run.name}, stage {loaded.stage}: http://{at}:{port}", file=sys.stderr)
    if not key and not ipaddress.ip_address(host).is_loopback:
        print("other machines can reach it, and no NANOCHAT_API_KEY is set: anybody may ask", file=sys.stderr)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())

"""Chat with a trained model in the terminal.

    python -m nanochat_jax.chat --run-dir runs/demo
    python -m nanochat_jax.chat --run-dir runs/demo -p "Who are you?"

Ctrl-C stops an answer; /clear starts again, /exit or Ctrl-D leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nanochat_jax.calculator import CalculatorTool
from nanochat_jax.errors import UserError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.chat", description=__doc__.split("\n\n")[0])
    p.add_argument("--run-dir", required=True, help="the run directory")
    p.add_argument("--stage", help="base, mid, sft or rl; default: the latest that has ended")
    p.add_argument("-p", "--prompt", help="answer this and leave")
    p.add_argument("--temperature", type=float, default=0.6, help="0 always takes the likeliest token; default 0.6")
    p.add_argument("--top-k", type=int, default=50, help="of the likeliest tokens; 0: all; default 50")
    p.add_argument("--top-p", type=float, default=1.0, help="of the probability; default 1")
    p.add_argument("--max-tokens", type=int, default=256, help="of an answer; default 256")
    p.add_argument("--seed", type=int, help="of the first answer; default: another one each time")
    args = p.parse_args(argv)
    if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.max_tokens < 1:
        p.error("needs --temperature >= 0, --top-k >= 0, 0 < --top-p <= 1, --max-tokens >= 1")
    return args


class Chat:
    """A conversation with one model."""

    def __init__(self, engine, tok, args: argparse.Namespace):
        self.engine, self.tok, self.args = engine, tok, args
        self.messages: list[dict] = []
        self.seed = random.randrange(2**31) if args.seed is None else args.seed

    def ask(self, text: str, out: Console) -> str:
        """Prints the answer to `text` as it is made and returns its visible text; Ctrl-C ends it where it is."""
        from nanochat_jax.dialogue import answer, fit, prompt_limit
        from nanochat_jax.engine import Request

        a, stop = self.args, (self.tok.assistant_end, self.tok.bos)
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = fit(self.tok, asked, prompt_limit(self.engine, a.max_tokens))
        request = Request(ids, a.max_tokens, a.temperature, a.top_k, a.top_p, self.seed, stop)
        said, pieces = "", answer(self.engine, self.tok, request)
        try:
            for kind, piece in pieces:
                if kind == "text":
                    said += piece
                    out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                elif out.is_terminal:  # the call in grey, its result after an equals sign
                    shown = piece if kind == "python" else f"={piece} "
                    out.print(shown, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            pieces.close()
            out.print(" [stopped]", style="dim", end="", markup=False)
        out.print()
        self.seed += 1
        self.messages = [*asked, {"role": "assistant", "content": said}]
        return said


def loop(chat: Chat, title: str, out: Console) -> None:
    """Reads questions until the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history and can be edited)
    out.print(f"{title}. /clear starts again, /exit leaves, Ctrl-C stops an answer.", style="dim", markup=False)
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if text == "/exit":
            return
        if text == "/clear":
            chat.messages = []
        elif text.startswith("/"):
            out.print("unknown command; there are /clear and /exit", style="dim")
        elif text:
            out.print("nanochat: ", end="", style="bold")
            chat.ask(text, out)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.devices import use_compilation_cache
    from nanochat_jax.engine import Engine

    out = Console(highlight=False)
    try:
        loaded = load_model(args.run_dir, args.stage)
        use_compilation_cache(Path(args.run_dir).absolute().parent / "cache" / "compiled")
        length = loaded.model.cfg.sequence_len
        engine = Engine(loaded.model, slots=1, max_len=length, tool=CalculatorTool(loaded.tokenizer))
        chat = Chat(engine, loaded.tokenizer, args)
        if args.prompt is not None:
            chat.ask(args.prompt, out)
        else:
            loop(chat, f"{Path(args.run_dir).name}, stage {loaded.stage}", out)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

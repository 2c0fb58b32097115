"""Chat with a trained model in the terminal.

    python -m nanochat_jax.chat --run-dir runs/demo
    python -m nanochat_jax.chat --run-dir runs/demo -p "Who are you?"

Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from nanochat_jax import processes
from nanochat_jax.cli import command
from nanochat_jax.engine.calculator import CalculatorTool


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


COMMANDS = {
    "/temperature": "X   how freely it draws; 0 always takes the likeliest token",
    "/topk": "N          of the likeliest tokens; 0: all",
    "/topp": "P          of the fewest tokens whose probability reaches P",
    "/length": "N        tokens of an answer at most",
    "/system": "TEXT     what stands before the conversation; alone: nothing",
    "/again": "          answers the last question anew",
    "/clear": "          starts again",
    "/help": "           this",
    "/exit": "           leaves",
}
HISTORY = Path("~/.nanochat_jax_history")  # of what was typed, for the arrow keys


class Chat:
    """A conversation with one model."""

    def __init__(self, engine, tok, args: argparse.Namespace):
        self.engine, self.tok, self.args = engine, tok, args
        self.system, self.messages = "", []
        self.seed = random.randrange(2**31) if args.seed is None else args.seed

    def ask(self, text: str, out: Console) -> str:
        """Prints the answer to `text` as it is made and returns its visible text; Ctrl-C ends it where it is."""
        from nanochat_jax.engine.dialogue import answer, fit, prompt_limit
        from nanochat_jax.engine.engine import Request

        a, stop = self.args, (self.tok.assistant_end, self.tok.bos)
        asked = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = fit(self.tok, [*system, *asked], prompt_limit(self.engine, a.max_tokens))
        if prompt.dropped or prompt.truncated:
            out.print("[the conversation is longer than the context; a part is left out] ", style="dim", markup=False)
        request = Request(prompt.ids, a.max_tokens, a.temperature, a.top_k, a.top_p, self.seed, stop)
        parts, pieces = [], answer(self.engine, self.tok, request)
        try:
            for kind, piece in pieces:
                if parts and parts[-1]["type"] == kind:
                    parts[-1]["text"] += piece
                else:
                    parts.append({"type": kind, "text": piece})
                if kind == "text":
                    out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                elif out.is_terminal:  # the call in grey, its result after an equals sign
                    shown = piece if kind == "python" else f"={piece} "
                    out.print(shown, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            pieces.close()
            out.print(" [stopped]", style="dim", end="", markup=False)
        out.print()
        self.seed += 1
        said = "".join(part["text"] for part in parts if part["type"] == "text")
        # with its calls, so that the next prompt begins with what the engine has in its cache
        tools = any(part["type"] != "text" for part in parts)
        self.messages = [*asked, {"role": "assistant", "content": parts if tools else said}]
        return said

    def command(self, line: str, out: Console) -> bool:
        """Does what a line that begins with a slash says; False where that is to leave."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/exit":
            return False
        if name == "/clear":
            self.messages = []
        elif name == "/system":
            self.system, self.messages = value, []
        elif name == "/again":
            if self.messages:
                question, self.messages = self.messages[-2]["content"], self.messages[:-2]
                self.ask(question, out)
        elif name in SETTINGS:
            self._set(name, value, out)
        else:
            if name != "/help":
                out.print(f"there is no command {name}", style="dim", markup=False)
            for known, meaning in COMMANDS.items():
                out.print(f"{known} {meaning}", style="dim", markup=False, highlight=False)
        return True

    def _set(self, name: str, value: str, out: Console) -> None:
        attribute, kind, allowed, rule = SETTINGS[name]
        try:
            number = kind(value) if value else getattr(self.args, attribute)
            if not allowed(number):
                raise ValueError
        except ValueError:
            out.print(f"{name} needs {rule}, not {value}", style="dim", markup=False)
            return
        setattr(self.args, attribute, number)
        out.print(f"{name[1:]} is {number}", style="dim", markup=False)


# command -> (attribute of the arguments, type, what is allowed, in words)
SETTINGS = {
    "/temperature": ("temperature", float, lambda x: 0 <= x < 100, "a number of 0 or more"),
    "/topk": ("top_k", int, lambda x: x >= 0, "a whole number of 0 or more"),
    "/topp": ("top_p", float, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "/length": ("max_tokens", int, lambda x: x >= 1, "a whole number of 1 or more"),
}


def loop(chat: Chat, title: str, out: Console) -> None:
    """Reads questions until the end of input."""
    out.print(f"{title}. /help lists the commands, Ctrl-C stops an answer.", style="dim", markup=False)
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if text.startswith("/"):
            if not chat.command(text, out):
                return
        elif text:
            out.print("nanochat: ", end="", style="bold")
            chat.ask(text, out)


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Lets input() be edited and remember what was typed, here and in the next session."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = HISTORY.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.devices import prepare, use_compilation_cache
    from nanochat_jax.engine.engine import Engine

    prepare()
    out = Console(highlight=False)
    loaded = load_model(args.run_dir, args.stage)
    use_compilation_cache(Path(args.run_dir).absolute().parent / "cache" / "compiled")
    length = loaded.model.cfg.sequence_len
    engine = Engine(loaded.model, slots=1, max_len=length, tool=CalculatorTool(loaded.tokenizer))
    chat = Chat(engine, loaded.tokenizer, args)
    if args.prompt is not None:
        chat.ask(args.prompt, out)
    else:
        with line_history():
            loop(chat, f"{Path(args.run_dir).name}, stage {loaded.stage}", out)


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())

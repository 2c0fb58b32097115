"""Chat with a trained model in the terminal.

Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands.
"""

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from nanochat_jax import processes
from nanochat_jax.cli import command
from nanochat_jax.engine.tools import Tools


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.chat", description=__doc__.split("\n\n")[0])
    p.add_argument("--run-dir", required=True, help="the run directory")
    p.add_argument("--stage", help="base, mid, sft or rl; default: the latest that has ended")
    p.add_argument("-p", "--prompt", help="answer this and leave")
    p.add_argument("--temperature", type=float, default=0.6, help="0 always takes the likeliest token; default 0.6")
    p.add_argument("--top-k", type=int, default=50, help="of the likeliest tokens; 0: all; default 50")
    p.add_argument("--top-p", type=float, default=1.0, help="of the probability; default 1")
    p.add_argument("--max-tokens", type=int, default=256, help="of an answer; default 256")
    p.add_argument("--think", type=thoughts, default=False, metavar="on|off|N", help="think first, in N tokens at most")
    p.add_argument("--seed", type=int, help="of the first answer; default: another one each time")
    args = p.parse_args(argv)
    if not 0 <= args.temperature < 100 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.max_tokens < 1:
        p.error("needs 0 <= --temperature < 100, --top-k >= 0, 0 < --top-p <= 1, --max-tokens >= 1")
    return args


def thoughts(text: str) -> bool | int:
    """Whether to think first; a number: in so many tokens. ValueError."""
    known = {"on": True, "off": False}
    return known[text] if text in known else int(text) if int(text) > 0 else False


COMMANDS = {
    "/temperature": "X   of sampling; 0 always takes the likeliest token",
    "/topk": "N          samples from the N likeliest tokens; 0: all",
    "/topp": "P          samples from the fewest tokens whose probability reaches P",
    "/length": "N        tokens of an answer at most",
    "/think": "on|off|N  thinks first, in N tokens at most",
    "/system": "TEXT     starts again with this system message; alone: with none",
    "/again": "          answers the last question again",
    "/clear": "          starts a new conversation",
    "/help": "           this",
    "/exit": "           leaves",
}
# command -> (attribute of the arguments, type, what is allowed, in words)
SETTINGS: dict[str, tuple[str, Callable[[str], float], Callable[[float], bool], str]] = {
    "/temperature": ("temperature", float, lambda x: 0 <= x < 100, "a number of 0 or more"),
    "/topk": ("top_k", int, lambda x: x >= 0, "a whole number of 0 or more"),
    "/topp": ("top_p", float, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "/length": ("max_tokens", int, lambda x: x >= 1, "a whole number of 1 or more"),
    "/think": ("think", thoughts, lambda x: True, "on, off or a number of tokens"),
}
HISTORY = Path("~/.nanochat_jax_history")  # of what was typed, for the arrow keys


def say(out: Console, text: str, style: str | None = "dim", end: str = "\n") -> None:
    """Prints text as it is: what is like rich's markup or the name of an emoji stays."""
    out.out(text, style=style, end=end, highlight=False)


class Chat:
    def __init__(self, engine, tok, args: argparse.Namespace):
        self.engine, self.tok, self.args = engine, tok, args
        self.system = ""
        self.messages: list[dict] = []
        self.seed = random.randrange(2**31) if args.seed is None else args.seed

    def ask(self, text: str, out: Console) -> str:
        """Prints the answer to `text` as it is made and returns its visible text; Ctrl-C ends it where it is."""
        from nanochat_jax.chats import system_text
        from nanochat_jax.engine.dialogue import answer, fit, joined, prompt_limit
        from nanochat_jax.engine.engine import Request

        a, stop = self.args, (self.tok.assistant_end, self.tok.bos)
        asked = [*self.messages, {"role": "user", "content": text}]
        said_first = system_text([], a.think, self.system)
        system = [{"role": "system", "content": said_first}] if said_first else []
        prompt = fit(self.tok, [*system, *asked], prompt_limit(self.engine, a.max_tokens))
        if prompt.dropped or prompt.truncated:
            say(out, "[the conversation is longer than the context; a part is left out]")
        machine = Tools(self.tok, budget=None if a.think is True else a.think or None)
        request = Request(prompt.ids, a.max_tokens, a.temperature, a.top_k, a.top_p, self.seed, stop, tool=machine)
        said: list[tuple[str, str]] = []  # (kind, text)
        began = time.perf_counter()
        pieces = answer(self.engine, self.tok, request)
        try:
            for kind, piece in pieces:
                if said and said[-1][0] == "think" != kind and out.is_terminal:
                    say(out, f" [thought for {time.perf_counter() - began:.1f} s]")
                said.append((kind, piece))
                if kind == "text":
                    say(out, piece, style=None, end="")
                elif out.is_terminal:  # thoughts and calls in grey, the result of a call after an equals sign
                    say(out, f"={piece} " if kind == "python_output" else piece, end="")
        except KeyboardInterrupt:
            pieces.close()
            say(out, " [stopped]", end="")
        out.print()
        self.seed += 1
        # with its tool calls, so that the next prompt begins with what the engine has in its cache
        parts = [{"type": kind, "text": text} for kind, text in joined(said) if kind != "think"]
        visible = "".join(part["text"] for part in parts if part["type"] == "text")
        has_calls = any(part["type"] != "text" for part in parts)
        self.messages = [*asked, {"role": "assistant", "content": parts if has_calls else visible}]
        return visible

    def command(self, line: str, out: Console) -> bool:
        """Runs a line that begins with a slash; False for /exit."""
        name, _, value = (part.strip() for part in line.partition(" "))
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
                say(out, f"there is no command {name}")
            say(out, "\n".join(f"{known} {meaning}" for known, meaning in COMMANDS.items()))
        return True

    def _set(self, name: str, value: str, out: Console) -> None:
        attribute, kind, allowed, rule = SETTINGS[name]
        with contextlib.suppress(ValueError):
            number = kind(value) if value else getattr(self.args, attribute)
            if allowed(number):
                setattr(self.args, attribute, number)
                return say(out, f"{name[1:]} is {number}")
        say(out, f"{name} needs {rule}, not {value}")


def loop(chat: Chat, title: str, out: Console) -> None:
    say(out, f"{title}. /help lists the commands, Ctrl-C stops an answer.")
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
    """Lets the lines of input() be edited, and recalled here and in the next session."""
    try:
        import readline
    except ImportError:  # as on Windows
        yield
        return
    readline.set_history_length(1000)
    nowhere = (OSError, RuntimeError)  # the latter: nobody knows where the home is
    with contextlib.suppress(*nowhere):
        readline.read_history_file(HISTORY.expanduser())
    try:
        yield
    finally:
        with contextlib.suppress(*nowhere):
            readline.write_history_file(HISTORY.expanduser())


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.devices import prepare, use_compilation_cache
    from nanochat_jax.engine.engine import Engine

    prepare()
    out = Console(highlight=False)
    loaded = load_model(args.run_dir, args.stage)
    use_compilation_cache(Path(args.run_dir).absolute().parent / "cache" / "compiled")
    model, tok = loaded.model, loaded.tokenizer
    chat = Chat(Engine(model, slots=1, max_len=model.cfg.sequence_len, tool=Tools(tok)), tok, args)
    if args.prompt is not None:
        chat.ask(args.prompt, out)
        return
    with line_history():
        loop(chat, f"{Path(args.run_dir).name}, stage {loaded.stage}", out)


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())

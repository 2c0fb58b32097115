"""Tools in the middle of an answer: the state machine that an engine feeds with tokens, and that forces others.

The calculator answers at once. A call of a tool that is the caller's ends the answer, which goes on when the caller has
run it. Thoughts that have had their budget of tokens are closed.
"""

from collections.abc import Collection

from nanochat_jax.engine.calculator import use_calculator
from tokenizer import StreamDecoder
from tokenizer.chat import THOUGHTS, Thinking


class Tools:
    """Where a sequence stands: outside of a call, or inside of one, whose tokens are collected.

    callers: names of functions that the caller runs. budget: tokens of thoughts at most; None for any number.
    """

    def __init__(self, tok, callers: Collection[str] = (), budget: int | None = None) -> None:
        self._tok, self._callers, self._budget = tok, frozenset(callers), budget
        self._call: list[int] | None = None
        self._thinking, self._decoder, self._thoughts = Thinking(), StreamDecoder(tok), 0

    def start(self) -> "Tools":
        return Tools(self._tok, self._callers, self._budget)

    def push(self, id: int) -> list[int]:
        """Takes the next token; returns the tokens that must follow it, mostly none. assistant_end ends the answer."""
        tok = self._tok
        if id == tok.python_start:
            self._call, self._thinking = [], Thinking()
        elif id == tok.python_end and self._call is not None:
            call, self._call = tok.decode(self._call), None
            if name_of(call) in self._callers:
                return [tok.assistant_end]
            if (result := use_calculator(call)) is not None:
                return [tok.output_start, *tok.encode(result), tok.output_end]
        elif self._call is not None:
            self._call.append(id)
        elif self._budget is not None:
            return self._thought(id)
        return []

    def _thought(self, id: int) -> list[int]:
        """Counts a token of thoughts; the last one that there may be is followed by their end."""
        pieces = self._thinking.push(self._decoder.push(id))
        self._thoughts += any(kind == "think" for kind, _ in pieces)
        if self._thoughts < (self._budget or 0) or not pieces or pieces[-1][0] != "think":
            return []
        self._thinking.push(f" {THOUGHTS[1]}")
        return self._tok.encode(f" {THOUGHTS[1]}")


def name_of(call: str) -> str:
    """The name of the function that is called; empty where none is."""
    name, bracket, _ = call.partition("(")
    return name.strip() if bracket else ""

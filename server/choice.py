"""One answer as it is made: ids become text, text that may begin a stop string waits, and a stop string ends it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nanochat_jax.engine.dialogue import Piece, Reader


class Token(NamedTuple):
    """A visible token: its log-probability, those of the likeliest ones, and where in the text it begins."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]
    offset: int


@dataclass
class Shown:
    """Text of one kind that may be shown now, and its tokens where log-probabilities were asked for."""

    kind: str  # text, think, python or python_output
    text: str
    call: int
    tokens: list[Token]


class Choice:
    """Takes ids, gives what may be shown: `text`, `thoughts` and `calls`. `reason` is set when it has ended.

    A stop string is looked for in the visible text alone, and is not shown. What waits, waits with all that follows
    it, so that the calls of a tool stay at their places.
    """

    def __init__(self, tok, stops: Sequence[str] = (), trimmed: bool = False):
        self.reason: str | None = None
        self.text = self.thoughts = ""
        self.calls: list[dict] = []
        self.tokens: list[Token] = []
        self.n_ids = self.n_thoughts = 0  # how many were taken, and how many of them were thoughts
        self._tok, self._reader, self._stops = tok, Reader(tok), stops
        self._space = trimmed  # one before the first text is left out: it stood between a call's result and the answer
        self._waiting: deque[Shown] = deque()
        self._held = ""  # the visible text of what waits

    def push(self, ids: Sequence[int], logprobs: Sequence = ()) -> list[Shown]:
        """What may be shown now. `logprobs`: as long as ids, or empty. After the end nothing is taken any more."""
        out: list[Shown] = []
        for i, id in enumerate(ids):
            if self.reason is not None:
                break
            self.n_ids += 1
            pieces = self._reader.push(id)
            self.n_thoughts += any(piece.kind == "think" for piece in pieces)
            for piece in pieces:
                if self.reason is None:
                    last = piece is pieces[-1]
                    self._take(out, piece, id, logprobs[i] if logprobs and last else None)
        return out

    def finish(self, reason: str) -> list[Shown]:
        out: list[Shown] = []
        for piece in self._reader.flush():
            if self.reason is None:
                self._take(out, piece)
        if self.reason is None:
            self._show(out, len(self._held))
            self.reason = reason
        return out

    def _take(self, out: list[Shown], piece: Piece, id: int = -1, logprob=None) -> None:
        if self._space and piece.kind == "text" and piece.text:
            piece, self._space = piece._replace(text=piece.text.removeprefix(" ")), False
        offset = len(self.text) + len(self._held)
        visible = logprob is not None and piece.kind == "text" and self._tok.decode_bytes([id])
        tokens = [Token(id, logprob.logprob, logprob.top, offset)] if visible else []
        if piece.text or tokens:
            self._waiting.append(Shown(piece.kind, piece.text, piece.call, tokens))
        if piece.kind == "text":
            self._held += piece.text
        if found := [at for stop in self._stops if (at := self._held.find(stop)) >= 0]:
            self._show(out, min(found))
            self._waiting.clear()
            self.reason = "stop"
        else:  # the last characters may begin a stop string
            begun = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
            self._show(out, len(self._held) - max(begun, default=0))

    def _show(self, out: list[Shown], chars: int) -> None:
        """Moves what waits to `out`, up to `chars` characters of visible text."""
        while self._waiting:
            part = self._waiting[0]
            if part.kind == "text" and len(part.text) > chars:
                if chars == 0:
                    return
                self._waiting[0] = replace(part, text=part.text[chars:], tokens=[])
                part.text = part.text[:chars]  # with all its tokens, as they begin here
            else:
                self._waiting.popleft()
            if part.kind == "text":
                chars -= len(part.text)
                self.text += part.text
                self._held = self._held[len(part.text) :]
                self.tokens += part.tokens
            elif part.kind == "think":
                self.thoughts += part.text
            else:
                while len(self.calls) <= part.call:
                    self.calls.append({"index": len(self.calls), "name": "calculator", "input": "", "output": ""})
                self.calls[part.call]["input" if part.kind == "python" else "output"] += part.text
            if out and (out[-1].kind, out[-1].call) == (part.kind, part.call):
                out[-1].text += part.text
                out[-1].tokens += part.tokens
            else:
                out.append(part)

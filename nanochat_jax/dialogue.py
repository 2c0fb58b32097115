"""Between people and the engine: messages that fit the context, and tokens as text that may be shown as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanochat_jax.engine import Engine, Request
from tokenizer import Tokenizer
from tokenizer.chat import render_prompt


def fit(tok: Tokenizer, messages: Sequence[dict], limit: int) -> list[int]:
    """The prompt of a conversation in at most `limit` ids (5 or more), for the assistant to answer.

    The oldest exchanges go first, a system message stays; of a last message that is too long by itself the end is
    kept. UserError where the messages are no conversation.
    """
    system, turns = (messages[:1], messages[1:]) if messages and _role(messages[0]) == "system" else ([], messages)
    ids = render_prompt(tok, [*system, *turns])
    while len(ids) > limit and len(turns) > 2:
        turns = turns[2:]
        ids = render_prompt(tok, [*system, *turns])
    if len(ids) > limit:  # bos, user_start, ..., user_end, assistant_start
        ids = ids[:2] + ids[2:-2][len(ids) - limit :] + ids[-2:]
    return ids


def _role(message) -> str | None:
    return message.get("role") if isinstance(message, dict) else None


class Pieces:
    """Ids of a completion as (kind, text) pieces, kind text, python or python_output; never half a character."""

    def __init__(self, tok: Tokenizer):
        self._kinds = {
            tok.python_start: "python",
            tok.output_start: "python_output",
            tok.python_end: "text",
            tok.output_end: "text",
        }
        self._kind, self._decoder = "text", tok.stream()

    def push(self, ids: Sequence[int]) -> list[tuple[str, str]]:
        """What is complete now; pieces of one kind in a row are joined."""
        out: list[tuple[str, str]] = []
        for id in ids:
            if id in self._kinds:
                self._add(out, self._decoder.flush())
                self._kind = self._kinds[id]
            else:
                self._add(out, self._decoder.push(id))
        return out

    def flush(self) -> list[tuple[str, str]]:
        """What is left at the end."""
        out: list[tuple[str, str]] = []
        self._add(out, self._decoder.flush())
        return out

    def _add(self, out: list[tuple[str, str]], text: str) -> None:
        if not text:
            return
        if out and out[-1][0] == self._kind:
            text = out.pop()[1] + text
        out.append((self._kind, text))


def answer(engine: Engine, tok: Tokenizer, request: Request) -> Iterator[tuple[str, str]]:
    """Pieces of one request's completion as they are made. Closing the iterator cancels the request."""
    ticket, pieces, ended = engine.submit(request), Pieces(tok), False
    try:
        while not ended:
            for event in engine.step():
                if event.ticket is ticket:
                    yield from pieces.push(event.ids)
                    ended = event.completion is not None
        yield from pieces.flush()
    finally:
        if not ended:
            engine.cancel(ticket)
            engine.step()


def prompt_limit(engine: Engine, max_new_tokens: int) -> int:
    """How long a prompt may be so that an answer still has room: at least half of the context is the prompt's."""
    return engine.max_len - min(max_new_tokens, engine.max_len // 2)

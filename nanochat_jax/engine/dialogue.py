"""Between text and the engine: conversations cut to fit the context, and ids turned into text as they are made."""

import itertools
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

from nanochat_jax.engine.engine import Engine, Request
from tokenizer import StreamDecoder, Tokenizer
from tokenizer.chat import render, render_prompt


class Fitted(NamedTuple):
    """A prompt, and what it had to leave out."""

    ids: list[int]
    dropped: int = 0  # messages that are not in it
    truncated: bool = False  # the last message, or the system message, is not whole


def fit(tok: Tokenizer, messages: Sequence[dict], limit: int) -> Fitted:
    """The prompt of a conversation in at most `limit` ids (10 or more), for the assistant to answer or to go on with.

    The system message and the first exchange stay, which say what the conversation is about, and the newest others. A
    last message that is still too long loses its front; for its sake goes a first exchange that fills more than half.
    UserError where the messages are no conversation.
    """
    whole = render_prompt(tok, messages)
    if len(whole) <= limit:
        return Fitted(whole)
    if messages[-1]["role"] == "assistant":
        begun = whole[len(render_prompt(tok, messages[:-1])) :]
        ids, dropped, truncated = fit(tok, messages[:-1], limit - len(begun[-limit // 2 :]))
        return Fitted(ids + begun[-limit // 2 :], dropped, truncated or len(begun) > limit // 2)
    system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    first, last, between = turns[:2], turns[-1], turns[2:-1]
    if len(turns) > 2:
        head = render(tok, {"messages": [*system, *first]})[0]
        end = render_prompt(tok, [last])[1:]
        if len(head) + len(end) <= limit:
            middle, kept = _newest(tok, between, limit - len(head) - len(end))
            return Fitted(head + middle + end, len(between) - kept)
        if len(head) <= limit // 2:
            return Fitted(head + _cut(tok, "", last, limit - len(head) + 1)[1:], len(between), True)
    alone = render_prompt(tok, [*system, last])
    if len(alone) <= limit:
        return Fitted(alone, len(turns) - 1)
    return Fitted(_cut(tok, _text(system[0]) + "\n\n" if system else "", last, limit), len(turns) - 1, True)


def _newest(tok: Tokenizer, turns: Sequence[dict], room: int) -> tuple[list[int], int]:
    """(ids, messages) of the newest exchanges that have at most `room` ids together."""
    ids: list[int] = []
    kept = 0
    for at in range(len(turns) - 2, -1, -2):
        pair = render(tok, {"messages": turns[at : at + 2]})[0][1:]
        if len(ids) + len(pair) > room:
            break
        ids, kept = pair + ids, kept + 2
    return ids, kept


def _cut(tok: Tokenizer, system: str, message: dict, limit: int) -> list[int]:
    """A prompt of at most `limit` ids: the front of `system`, in half of them at most, and the end of the message."""
    room = limit - 4  # bos, user_start, ..., user_end, assistant_start
    front = tok.encode(system)[: room // 2]
    back = tok.encode(_text(message))[len(front) - room :]
    return [tok.bos, tok.user_start, *front, *back, tok.user_end, tok.assistant_start]


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class Piece(NamedTuple):
    """What one token adds: often no text yet, because a character's last byte is still to come."""

    kind: str  # text, python or python_output
    text: str
    call: int  # of the tool, counted from 0; that of a text means nothing


class Reader:
    """Ids of a completion, one at a time, as pieces; never half a character."""

    def __init__(self, tok: Tokenizer):
        self._kinds = {tok.python_start: "python", tok.output_start: "python_output"}
        self._kinds |= {tok.python_end: "text", tok.output_end: "text"}
        self._kind, self._call, self._answered, self._decoder = "text", -1, True, StreamDecoder(tok)

    def push(self, id: int) -> Piece:
        """The piece that an id completes. One that begins or ends a call ends what was before it."""
        if id not in self._kinds:
            return Piece(self._kind, self._decoder.push(id), self._call)
        piece, self._kind = self.flush(), self._kinds[id]
        if self._kind == "python" or self._kind == "python_output" and self._answered:
            self._call += 1
        self._answered = self._kind == "python_output" or self._answered and self._kind == "text"
        return piece

    def flush(self) -> Piece:
        """What is left at the end."""
        return Piece(self._kind, self._decoder.flush(), self._call)


def joined(pieces: Iterable[tuple]) -> list[tuple[str, str]]:
    """(kind, text) of pieces, or of such pairs, that say something; those of one kind in a row are one."""
    groups = itertools.groupby((p for p in pieces if p[1]), key=lambda p: p[0])
    return [(kind, "".join(p[1] for p in group)) for kind, group in groups]


def answer(engine: Engine, tok: Tokenizer, request: Request) -> Generator[tuple[str, str], None, None]:
    """(kind, text) of one request's completion as it is made. Closing the generator cancels the request."""
    ticket, reader, ended = engine.submit(request), Reader(tok), False
    try:
        while not ended:
            for event in engine.step():
                if event.ticket is ticket:
                    yield from joined(map(reader.push, event.ids))
                    ended = event.completion is not None
        yield from joined([reader.flush()])
    finally:
        if not ended:
            engine.cancel(ticket)
            engine.step()


def prompt_limit(engine: Engine, max_new_tokens: int) -> int:
    """How long a prompt may be so that an answer still has room: at least half of the context is the prompt's."""
    return engine.max_len - min(max_new_tokens, engine.max_len // 2)

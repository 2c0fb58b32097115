"""Between text and the engine: conversations cut to fit the context, and ids turned into text as they are made."""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from nanochat_jax.chats import text_of
from nanochat_jax.engine.engine import Completion, Engine, Request
from nanochat_jax.engine.tools import Tools, name_of
from tokenizer import StreamDecoder, Tokenizer
from tokenizer.chat import Thinking, render, render_prompt

AT_ONCE = 16  # calls of tools that are run at a time


class Fitted(NamedTuple):
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
    before = text_of(system[0]["content"]) + "\n\n" if system else ""
    return Fitted(_cut(tok, before, last, limit), len(turns) - 1, True)


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
    back = tok.encode(text_of(message["content"]))[len(front) - room :]
    return [tok.bos, tok.user_start, *front, *back, tok.user_end, tok.assistant_start]


class Piece(NamedTuple):
    """What one token adds: often no text yet, because a character's last byte is still to come."""

    kind: str  # text, think, python or python_output
    text: str
    call: int  # of the tool, counted from 0; that of a text means nothing


class Reader:
    """Ids of a completion, one at a time, as pieces; never half a character."""

    def __init__(self, tok: Tokenizer):
        self._kinds = {tok.python_start: "python", tok.output_start: "python_output"}
        self._kinds |= {tok.python_end: "text", tok.output_end: "text"}
        self._kind, self._call, self._answered, self._decoder = "text", -1, True, StreamDecoder(tok)
        self._thinking = Thinking()

    def push(self, id: int) -> list[Piece]:
        """The pieces that an id completes. One that begins or ends a call ends what was before it."""
        if id not in self._kinds:
            return self._pieces(self._decoder.push(id))
        pieces, self._kind = self.flush(), self._kinds[id]
        if self._kind == "python" or self._kind == "python_output" and self._answered:
            self._call += 1
        self._answered = self._kind == "python_output" or self._answered and self._kind == "text"
        return pieces

    def flush(self) -> list[Piece]:
        pieces = self._pieces(self._decoder.flush())
        return pieces + [Piece(*said, self._call) for said in self._thinking.end()]

    def _pieces(self, text: str) -> list[Piece]:
        if self._kind != "text":
            return [Piece(self._kind, text, self._call)]
        said = self._thinking.push(text) or [(self._thinking.kind or "text", "")]
        return [Piece(kind, piece, self._call) for kind, piece in said]


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
                    yield from joined(piece for id in event.ids for piece in reader.push(id))
                    ended = event.completion is not None
        yield from joined(reader.flush())
    finally:
        if not ended:
            engine.cancel(ticket)
            engine.step()


def prompt_limit(engine: Engine, max_new_tokens: int) -> int:
    """How long a prompt may be so that an answer has room: at least two thirds of the context are the prompt's."""
    return engine.max_len - min(max_new_tokens, engine.max_len // 3)


class Caller(NamedTuple):
    """Who runs the calls of an answer: the names of functions, and what comes of a call's text. budget: tokens of its
    thoughts at most."""

    names: frozenset[str] = frozenset()
    act: Callable[[str], str] = str
    budget: int | None = None


def converse(engine, tok: Tokenizer, requests: Sequence[Request], callers: Sequence[Caller | None]) -> list[Completion]:
    """Completions of requests, all in batches. An answer that ends with a call of its caller's goes on behind what that
    gave, which is not of the model's making (mask 0); its slot still holds what was before.

    engine: anything with max_len and generate(requests). No log-probabilities.
    """
    whole, going = [Completion() for _ in requests], list(range(len(requests)))
    while going:
        done = engine.generate([_further(tok, requests[i], whole[i].ids, callers[i]) for i in going])
        for i, part in zip(going, done):
            whole[i] = Completion(whole[i].ids + part.ids, whole[i].mask + part.mask, part.finish_reason)
        calls = {i: call for i in going if (call := _call_of(tok, whole[i], callers[i]))}
        acts = [caller.act for i in calls if (caller := callers[i])]
        with ThreadPoolExecutor(AT_ONCE) as pool:  # they may wait, for processes or for others
            results = list(pool.map(lambda act, call: act(call), acts, calls.values()))
        going = []
        for i, result in zip(calls, results):
            said = [tok.output_start, *tok.encode(result), tok.output_end]
            if len(said) < min(requests[i].max_new_tokens, engine.max_len - len(requests[i].ids)) - len(whole[i].ids):
                whole[i] = Completion(whole[i].ids + said, whole[i].mask + [0] * len(said), "stop")
                going.append(i)
            else:
                whole[i].finish_reason = "length"
    return whole


def _further(tok: Tokenizer, request: Request, said: list[int], caller: Caller | None) -> Request:
    """A request to go on with what was said."""
    left, tool = request.max_new_tokens - len(said), Tools(tok, caller.names, caller.budget) if caller else request.tool
    return replace(request, ids=[*request.ids, *said], max_new_tokens=left, tool=tool)


def _call_of(tok: Tokenizer, said: Completion, caller: Caller | None) -> str:
    """The call with which an answer stopped; empty where it did not."""
    if not caller or said.finish_reason != "stop" or said.ids[-1:] != [tok.python_end]:
        return ""
    begun = len(said.ids) - said.ids[::-1].index(tok.python_start) if tok.python_start in said.ids else 0
    call = tok.decode(said.ids[begun:-1])
    return call if name_of(call) in caller.names else ""

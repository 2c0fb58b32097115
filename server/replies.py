"""What an answer looks like on the wire: OpenAI's chat completions and completions, whole or as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from nanochat_jax.engine.sampling import TokenLogprob
from nanochat_jax.engine.tools import name_of
from server.answer import Answer
from server.choice import Choice, Shown, Token
from server.errors import ApiError
from server.schemas import CompletionRequest, Sampling
from server.tools import CallReader
from tokenizer import SPECIAL_TOKENS

WAITING = ": waiting\n\n"  # a comment of an event stream


class ChatShape:
    """Chat completions. Calls of the caller's functions are in `tool_calls`; the calculator's in `tool`, which OpenAI
    has not; thoughts in `reasoning_content`, as vLLM and others have it. `content` is what is visible.
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tok, logprobs: bool, functions: Collection[str] = ()):
        self._tok, self._logprobs, self._functions = tok, logprobs, functions
        self._readers: dict[tuple[int, int], CallReader] = {}  # by choice and call, of a stream
        self._begun: set[tuple[int, int]] = set()  # calls of the calculator that a stream has named

    def opening(self, index: int) -> dict:
        """What a stream says of a choice before its first token."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def part(self, index: int, part: Shown) -> dict | None:
        if part.kind == "text":
            return self._chunk(index, {"content": part.text}, part.tokens)
        if part.kind == "think":
            return self._chunk(index, {"reasoning_content": part.text})
        if part.kind == "python" and self._may_be_own(index, part):
            reader = self._reader(index, part)
            begun, said = reader.begun, reader.push(part.text)
            call = {"function": {"arguments": said}} if begun else reader.call(said)
            return self._chunk(index, {"tool_calls": [{"index": 0, **call}]}) if said else None
        return self._calculated(index, part)

    def _reader(self, index: int, part: Shown) -> CallReader:
        return self._readers.setdefault((index, part.call), CallReader())

    def _may_be_own(self, index: int, part: Shown) -> bool:
        """Whether a call may be of one of the caller's functions, as far as its text goes."""
        reader = self._reader(index, part)
        head, bracket, _ = (reader.name + ("(" if reader.opened else "") + part.text).partition("(")
        return any(name == head if bracket else name.startswith(head) for name in self._functions)

    def _calculated(self, index: int, part: Shown) -> dict:
        said = {"input" if part.kind == "python" else "output": part.text}
        if (index, part.call) not in self._begun:  # clients put deltas together
            held = self._reader(index, part).name  # while it might have been the caller's
            said = {"name": "calculator", **said} | ({"input": held + said.get("input", "")} if held else {})
            self._begun.add((index, part.call))
        return self._chunk(index, {"tool": [{"index": part.call, **said}]})

    def closing(self, index: int, reason: str) -> dict:
        own = (reader for (at, _), reader in self._readers.items() if at == index and reader.opened)
        called = any(reader.name in self._functions for reader in own)
        return {**self._chunk(index, {}), "finish_reason": self._reason(reason, called)}

    def whole(self, index: int, choice: Choice) -> dict:
        message: dict = {"role": "assistant", "content": choice.text}
        if choice.thoughts:
            message["reasoning_content"] = choice.thoughts
        own = [call for call in choice.calls if name_of(call["input"]) in self._functions]
        if others := [call for call in choice.calls if call not in own]:
            message["tool"] = others
        if own:
            reader = CallReader()
            message |= {"content": choice.text or None, "tool_calls": [reader.call(reader.push(own[0]["input"]))]}
        reason = self._reason(choice.reason, bool(own))
        return {"index": index, "message": message, "finish_reason": reason, **self._told(choice.tokens)}

    def _reason(self, reason: str | None, called: bool) -> str | None:
        return "tool_calls" if called and reason == "stop" else reason

    def _chunk(self, index: int, delta: dict, tokens: Sequence[Token] = ()) -> dict:
        return {"index": index, "delta": delta, "finish_reason": None, **(self._told(tokens) if tokens else {})}

    def _told(self, tokens: Sequence[Token]) -> dict:
        def one(id: int, logprob: float) -> dict:
            return {"token": self._tok.decode([id]), "logprob": logprob, "bytes": list(self._tok.decode_bytes([id]))}

        content = [{**one(t.id, t.logprob), "top_logprobs": [one(*likely) for likely in t.top]} for t in tokens]
        return {"logprobs": {"content": content}} if self._logprobs else {}


class TextShape:
    """Completions, OpenAI's older API: text that goes on from text. echoed: of each prompt its text and tokens, to
    stand before what follows it; n answers to each."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, tok, logprobs: bool, echoed: Sequence[tuple[str, list[Token]]] = (), n: int = 1):
        self.tok, self._logprobs, self._echoed, self._n = tok, logprobs, echoed, n

    def opening(self, index: int) -> dict:
        return self._chunk(index, "", [])

    def part(self, index: int, part: Shown) -> dict | None:
        return self._chunk(index, part.text, part.tokens) if part.kind == "text" else None

    def closing(self, index: int, reason: str) -> dict:
        return self._chunk(index, "", [], reason)

    def whole(self, index: int, choice: Choice) -> dict:
        text, tokens = self._echoed[index // self._n] if self._echoed else ("", [])
        later = [t._replace(offset=t.offset + len(text)) for t in choice.tokens]
        return self._chunk(index, text + choice.text, [*tokens, *later], choice.reason)

    def _chunk(self, index: int, text: str, tokens: Sequence[Token], reason: str | None = None) -> dict:
        out = {"index": index, "text": text, "finish_reason": reason}
        if self._logprobs:
            out["logprobs"] = {
                "tokens": [self._named(t.id) for t in tokens],
                "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [{self._named(id): logprob for id, logprob in t.top} for t in tokens],
                "text_offset": [t.offset for t in tokens],
            }
        return out

    def _named(self, id: int) -> str:
        """A token's text; where it is a piece of a character, its bytes as OpenAI writes them."""
        raw = self.tok.decode_bytes([id])
        try:
            return raw.decode() or next(name for name in SPECIAL_TOKENS if getattr(self.tok, name[2:-2]) == id)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def echo(engine, tok, prompts: list[list[int]], body: CompletionRequest) -> list[tuple[str, list[Token]]]:
    """What stands before the answers to prompts: their text and, where they are asked for, the log-probabilities of
    their tokens but <|bos|>. Where one greedy token is to follow it stands here as well, whatever it is, for clients
    count on exactly one."""
    out = []
    for ids in prompts:
        scores: list[TokenLogprob] = []
        follows = body.is_scored and body.limit == 1
        if follows or body.logprobs is not None:
            *scores, last = engine.score([*ids, tok.bos], max(1, body.wanted_logprobs))
            if follows:
                best, logprob = last.top[0]
                ids, scores = [*ids, best], [*scores, last._replace(logprob=logprob)]
        starts = (len(tok.decode(ids[:end])) for end in range(1, len(ids)))
        top = max(0, body.wanted_logprobs)
        tokens = [Token(id, s.logprob, s.top[:top], at) for id, s, at in zip(ids[1:], scores, starts)]
        out.append((tok.decode(ids), tokens))
    return out


def scored(shape: TextShape, prompts: list[list[int]], body: CompletionRequest, model: str, headers: dict):
    """The response where scoring has told all that was asked for, and nothing is generated."""
    ended = Choice(shape.tok)
    ended.reason = "length"
    choices = [shape.whole(i, ended) for i in range(len(prompts) * (body.n or 1))]
    asked, made = sum(map(len, prompts)), len(choices) * body.limit
    usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    whole = {**head_of(shape, model), "object": shape.kind, "choices": choices, "usage": usage}
    return JSONResponse(whole, headers=headers)


def head_of(shape, model: str) -> dict:
    return {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


async def reply(
    answer: Answer, shape: ChatShape | TextShape, request: Request, body: Sampling, model: str, headers: dict, **extra
):
    """The response to a request: `extra` is said beside the choices, once."""
    head = head_of(shape, model)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Stream(
            answer, _events(answer, shape, {**head, "object": shape.chunk_kind}, include_usage, extra), headers
        )

    await to_the_end(answer, request)
    choices = [shape.whole(i, choice) for i, choice in enumerate(answer.choices)]
    whole = {**head, "object": shape.kind, **extra, "choices": choices, "usage": answer.usage()}
    return JSONResponse(whole, headers=headers)


async def to_the_end(answer: Answer, request: Request) -> None:
    """Waits for an answer, which is given up as soon as the client has gone."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.close()

    watching = asyncio.create_task(watch())
    try:
        async for _ in answer.shown():
            pass
        if watching.done():
            raise ApiError(499, "the client has gone")
    finally:
        watching.cancel()
        answer.close()


class Stream(StreamingResponse):
    """Server-sent events, after which the answer is closed, also where the client left before the first one."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncIterator[str], headers: dict[str, str]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _events(answer: Answer, shape, head: dict, include_usage: bool, extra: dict) -> AsyncIterator[str]:
    def event(choices: list, **more) -> str:
        usage = {"usage": None} if include_usage else {}
        return data({**head, "choices": choices, **usage, **more})

    # at once, however long it may have to wait: proxies and browsers give up where nothing comes
    yield event([shape.opening(i) for i in range(len(answer.choices))], **extra)
    ready: list[str] = []  # what comes at one time is sent as one piece
    try:
        async for index, parts in answer.shown():
            ready += [event([chunk]) for p in parts if (chunk := shape.part(index, p))]
            if reason := answer.choices[index].reason:
                ready.append(event([shape.closing(index, reason)]))
            if not answer.ended and (ready or not parts):
                yield "".join(ready) or WAITING
                ready = []
    except ApiError as e:
        ready.append(data(e.body()))
    else:
        if include_usage:
            ready.append(event([], usage=answer.usage()))
    yield "".join(ready) + "data: [DONE]\n\n"


def data(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

"""OpenAI's responses API: the same answers under other names. The newest are kept for those who refer to them."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from nanochat_jax.chats import Unusable, prompt_of
from server import tools
from server.answer import Answer
from server.errors import ApiError
from server.replies import WAITING, Stream, data, to_the_end
from server.schemas import MAX_MESSAGES, Conversing, Text, length_of


class ResponsesRequest(Conversing):
    input: Text | list[dict[str, Any]] = Field(min_length=1)
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1_000_000)
    text: dict[str, Any] | None = None  # its format
    previous_response_id: str | None = None
    store: bool | None = True  # keep what is said, for a while

    @model_validator(mode="after")
    def _alone(self):
        if self.previous_response_id:
            raise ValueError("previous_response_id is not supported: send the whole conversation")
        if self.n != 1:
            raise ValueError("n is not supported: a response is one answer")
        if isinstance(self.input, list) and len(self.input) > MAX_MESSAGES:
            raise ValueError(f"input: {MAX_MESSAGES} items are the limit")
        return self

    def chars(self) -> int:
        items = self.input if isinstance(self.input, list) else [{"content": self.input}]
        texts = (item.get(name) for item in items for name in ("content", "output", "arguments"))
        return sum(map(length_of, texts)) + len(self.instructions or "")

    @property
    def limit(self) -> int:
        return self.max_output_tokens or super().limit

    @property
    def schema_wanted(self) -> Any:
        return tools.schema_of((self.text or {}).get("format") or self.response_format)

    @property
    def wanted_logprobs(self) -> int:
        return -1

    def conversation(self) -> list[dict]:
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        try:
            return prompt_of([*first, *(message for item in items for message in _message(item))])
        except Unusable as e:
            raise ApiError(400, f"input: {e}", "input") from None


class Kept:
    """The newest items of responses by their ids: some clients send an id where an answer stood."""

    def __init__(self, most: int = 1000):
        self._items: dict[str, dict] = {}
        self._most = most

    def add(self, item: dict) -> None:
        self._items[item["id"]] = item
        if len(self._items) > self._most:
            del self._items[next(iter(self._items))]

    def resolved(self, given: str | list[dict]) -> str | list[dict]:
        """An input with what it refers to. ApiError where that is not known."""
        return given if isinstance(given, str) else list(map(self._item, given))

    def _item(self, item: dict) -> dict:
        if item.get("type") != "item_reference":
            return item
        if known := self._items.get(str(item.get("id"))):
            return known
        message = f"input: there is no item {str(item.get('id')):.80} here any more; send it whole, and store: false"
        raise ApiError(400, message, "input")


def _message(item: dict) -> Iterator[dict]:
    """An item of the input as a message; what the model thought by itself is none."""
    kind = item.get("type", "message")
    if kind == "function_call":
        yield {"role": "assistant", "content": None, "tool_calls": [{"function": item}]}
    elif kind == "function_call_output":
        yield {"role": "tool", "content": item.get("output")}
    elif kind == "message":
        yield item
    elif kind != "reasoning":
        raise Unusable(f"an item of type {kind!r:.30}")


async def respond(
    answer: Answer, request: Request, body: ResponsesRequest, model: str, headers: dict[str, str], kept: Kept, **extra
):
    """The response to a request, with what is `extra` in it; what it says is kept where the request wants that."""
    head, item = _head(body, model) | extra, Call() if body.calls else Message()
    if body.stream:
        return Stream(answer, _events(answer, head, item, kept), headers)
    await to_the_end(answer, request)
    choice = answer.choices[0]
    for kind, text in [("text", choice.text), *(("python", call["input"]) for call in choice.calls)]:
        item.push(kind, text)
    return JSONResponse(_ended(head, answer, item, kept), headers=headers)


def _head(body: ResponsesRequest, model: str) -> dict:
    """What a response says of itself, before its output."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": body.text or {"format": {"type": "text"}},
        "tools": body.tools or [],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": body.store is not False,
        "truncation": "auto",
        "metadata": {},
        "usage": None,
    }


class Message:
    """Text as an item of the output, and its events."""

    delta = "response.output_text.delta"

    def __init__(self) -> None:
        self._id, self.text = f"msg_{uuid.uuid4().hex}", ""
        self.at = {"item_id": self._id, "output_index": 0, "content_index": 0}

    @property
    def named(self) -> bool:
        """It is known well enough to begin it."""
        return True

    def push(self, kind: str, text: str) -> dict | None:
        """What an event says of more of the answer; None where that is not to be seen."""
        if kind != "text":
            return None
        self.text += text
        return {"delta": text, "logprobs": []}

    def item(self, status: str, begun: bool = False) -> dict:
        content = [] if begun else [self._part()]
        return {"type": "message", "id": self._id, "status": status, "role": "assistant", "content": content}

    def opening(self) -> Iterator[tuple[str, dict]]:
        """Events behind that of the item itself."""
        yield "response.content_part.added", {**self.at, "part": {**self._part(), "text": ""}}

    def closing(self) -> Iterator[tuple[str, dict]]:
        yield "response.output_text.done", {**self.at, "text": self.text, "logprobs": []}
        yield "response.content_part.done", {**self.at, "part": self._part()}

    def _part(self) -> dict:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


class Call:
    """A call of one of the caller's tools as an item of the output, and its events."""

    delta = "response.function_call_arguments.delta"

    def __init__(self) -> None:
        self._id, self._reader, self._arguments = f"fc_{uuid.uuid4().hex}", tools.CallReader(), ""
        self.at = {"item_id": self._id, "output_index": 0}

    @property
    def named(self) -> bool:
        return self._reader.begun

    def push(self, kind: str, text: str) -> dict | None:
        said = self._reader.push(text) if kind == "python" else ""
        self._arguments += said
        return {"delta": said} if said else None

    def item(self, status: str, begun: bool = False) -> dict:
        called = self._reader.call("" if begun else self._arguments)
        known = {"type": "function_call", "id": self._id, "call_id": called["id"], "status": status}
        return {**known, **called["function"]}

    def opening(self) -> Iterator[tuple[str, dict]]:
        yield from ()

    def closing(self) -> Iterator[tuple[str, dict]]:
        name = self._reader.name
        yield "response.function_call_arguments.done", {**self.at, "name": name, "arguments": self._arguments}


def _ended(head: dict, answer: Answer, item: Message | Call, kept: Kept) -> dict:
    usage, cut = answer.usage(), answer.choices[0].reason == "length"
    status = "incomplete" if cut else "completed"
    output = [item.item(status)] if item.named else []
    if output and head["store"]:
        kept.add(output[0])
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


async def _events(answer: Answer, head: dict, item: Message | Call, kept: Kept) -> AsyncIterator[str]:
    numbers = iter(range(1 << 62))

    def event(kind: str, **more) -> str:
        return f"event: {kind}\n" + data({"type": kind, "sequence_number": next(numbers), **more})

    def opening() -> str:
        added = event("response.output_item.added", output_index=0, item=item.item("in_progress", begun=True))
        return added + "".join(event(kind, **more) for kind, more in item.opening())

    yield event("response.created", response=head) + event("response.in_progress", response=head)
    begun = item.named
    if begun:
        yield opening()
    try:
        async for _, parts in answer.shown():
            said = [more for part in parts if (more := item.push(part.kind, part.text))]
            if said and not begun:
                begun = True
                yield opening()
            if said:
                yield "".join(event(item.delta, **item.at, **more) for more in said)
            elif not parts and not answer.ended:
                yield WAITING
    except ApiError as e:
        failed = {**head, "status": "failed", "error": {"code": "server_error", "message": e.detail}}
        yield event("response.failed", response=failed)
        return
    whole = _ended(head, answer, item, kept)
    closing = [event(kind, **more) for kind, more in item.closing()] if begun else []
    closing += [event("response.output_item.done", output_index=0, item=done) for done in whole["output"]]
    yield "".join(closing) + event(f"response.{whole['status']}", response=whole)

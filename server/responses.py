"""OpenAI's responses API: the same answers under other names. The newest are kept for those who refer to them."""

import itertools
import time
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from nanochat_jax.chats import Unusable
from nanochat_jax.engine.tools import name_of
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

    def said(self) -> list[dict]:
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*first, *(message for item in items for message in _message(item))]

    def conversation(self, functions: Sequence[Mapping], thinking: bool | int, notes: set[str]) -> list[dict]:
        try:
            return super().conversation(functions, thinking, notes)
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
        yield {"role": "assistant", "content": None, "tool_calls": [{"id": item.get("call_id"), "function": item}]}
    elif kind == "function_call_output":
        yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    elif kind == "message":
        yield item
    elif kind != "reasoning":
        raise Unusable(f"an item of type {kind!r:.30}")


async def respond(
    answer: Answer,
    request: Request,
    body: ResponsesRequest,
    model: str,
    headers: dict[str, str],
    kept: Kept,
    functions: Collection[str],
    **extra,
):
    """The response to a request, with what is `extra` in it; what it says is kept where the request wants that.
    functions: names of those that may be called."""
    head, output = _head(body, model) | extra, Output(functions)
    if body.stream:
        return Stream(answer, _events(answer, head, output, kept), headers)
    await to_the_end(answer, request)
    choice = answer.choices[0]
    output.push("think", choice.thoughts)
    output.push("text", choice.text)
    for call in choice.calls:
        output.push("python", call["input"])
    _ = output.end()
    return JSONResponse(_ended(head, answer, output, kept), headers=headers)


def _head(body: ResponsesRequest, model: str) -> dict:
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
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "store": body.store is not False,
        "truncation": "auto",
        "metadata": {},
        "usage": None,
    }


class Output:
    """The items that an answer becomes, in their order, and the events by which a stream tells of them."""

    def __init__(self, functions: Collection[str]):
        self._functions = functions
        self.items: list[Message | Thoughts | Call] = []
        self._kind, self._waiting = "", ""  # of the last part; of a call whose name is not whole yet

    def push(self, kind: str, text: str) -> list[tuple[str, dict]]:
        events: list[tuple[str, dict]] = []
        if kind != self._kind:
            events, self._kind, self._waiting = self.end(), kind, ""
        if kind == "python" and not self._is_open:
            self._waiting += text
            text, name = self._waiting, name_of(self._waiting)
            kind = kind if name in self._functions else ""
        if kind not in ITEMS or not text:
            return events
        if not self._is_open:
            self.items.append(ITEMS[kind](len(self.items)))
            events += self._opening()
        if said := self.items[-1].push(text):
            events.append((self.items[-1].delta, {**self.items[-1].at, "delta": said, **self.items[-1].beside}))
        return events

    def end(self) -> list[tuple[str, dict]]:
        if not self._is_open:
            return []
        item = self.items[-1]
        item.status = "completed"
        done = {"output_index": item.at["output_index"], "item": item.item()}
        return [*item.closing(), ("response.output_item.done", done)]

    @property
    def _is_open(self) -> bool:
        return bool(self.items) and self.items[-1].status == "in_progress"

    def _opening(self) -> list[tuple[str, dict]]:
        item = self.items[-1]
        added = {"output_index": item.at["output_index"], "item": item.item(begun=True)}
        return [("response.output_item.added", added), *item.opening()]


class _Item:
    """An item of the output. prefix: of its id. at, beside: what its events say beside their texts."""

    prefix, delta = "", ""
    beside: dict[str, Any] = {}

    def __init__(self, index: int) -> None:
        self._id, self.text, self.status = f"{self.prefix}_{uuid.uuid4().hex}", "", "in_progress"
        self.at = {"item_id": self._id, "output_index": index}

    def push(self, text: str) -> str:
        """What more of it says."""
        self.text += text
        return text

    def opening(self) -> list[tuple[str, dict]]:
        """Events behind that of the item itself."""
        return [("response.content_part.added", {**self.at, "part": {**self._part(), "text": ""}})]

    def closing(self) -> list[tuple[str, dict]]:
        said = (self.delta.replace(".delta", ".done"), {**self.at, "text": self.text, **self.beside})
        return [said, ("response.content_part.done", {**self.at, "part": self._part()})]

    def item(self, begun: bool = False) -> dict:
        content = [] if begun else [self._part()]
        return {"id": self._id, "status": self.status, **self.said(), "content": content}

    @abstractmethod
    def said(self) -> dict: ...

    @abstractmethod
    def _part(self) -> dict: ...


class Message(_Item):
    prefix, delta, beside = "msg", "response.output_text.delta", {"logprobs": []}

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.at["content_index"] = 0

    def said(self) -> dict:
        return {"type": "message", "role": "assistant"}

    def _part(self) -> dict:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


class Thoughts(Message):
    prefix, delta, beside = "rs", "response.reasoning_text.delta", {}

    def said(self) -> dict:
        return {"type": "reasoning", "summary": []}

    def _part(self) -> dict:
        return {"type": "reasoning_text", "text": self.text}


class Call(_Item):
    prefix, delta = "fc", "response.function_call_arguments.delta"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._reader = tools.CallReader()

    def push(self, text: str) -> str:
        return super().push(self._reader.push(text))

    def item(self, begun: bool = False) -> dict:
        known = {"type": "function_call", "id": self._id, "call_id": self._reader.id, "status": self.status}
        return {**known, "name": self._reader.name, "arguments": "" if begun else self.text}

    def opening(self) -> list[tuple[str, dict]]:
        return []

    def closing(self) -> list[tuple[str, dict]]:
        done = {**self.at, "name": self._reader.name, "arguments": self.text}
        return [("response.function_call_arguments.done", done)]


ITEMS: dict[str, Callable[[int], Any]] = {"text": Message, "think": Thoughts, "python": Call}


def _ended(head: dict, answer: Answer, output: Output, kept: Kept) -> dict:
    usage, cut = answer.usage(), answer.choices[0].reason == "length"
    items = [item.item() for item in output.items] or [Message(0).item() | {"status": "completed"}]
    if cut:
        items[-1]["status"] = "incomplete"
    for item in items if head["store"] else ():
        kept.add(item)
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": answer.choices[0].n_thoughts},
            "total_tokens": usage["total_tokens"],
        },
    }


async def _events(answer: Answer, head: dict, output: Output, kept: Kept) -> AsyncIterator[str]:
    numbers = itertools.count()

    def event(kind: str, **more) -> str:
        return f"event: {kind}\n" + data({"type": kind, "sequence_number": next(numbers), **more})

    yield event("response.created", response=head) + event("response.in_progress", response=head)
    try:
        async for _, parts in answer.shown():
            said = [told for part in parts for told in output.push(part.kind, part.text)]
            if said:
                yield "".join(event(kind, **more) for kind, more in said)
            elif not parts and not answer.ended:
                yield WAITING
    except ApiError as e:
        failed = {**head, "status": "failed", "error": {"code": "server_error", "message": e.detail}}
        yield event("response.failed", response=failed)
        return
    closing = "".join(event(kind, **more) for kind, more in output.end())
    whole = _ended(head, answer, output, kept)
    yield closing + event(f"response.{whole['status']}", response=whole)

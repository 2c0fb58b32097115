"""OpenAI's responses API: the same answers under other names. Nothing is kept between requests."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from nanochat_jax.chats import Unusable, prompt_of
from server.answer import Answer
from server.errors import Stopped
from server.replies import WAITING, Stream, data, to_the_end
from server.schemas import MAX_MESSAGES, Sampling, Text, length_of


class ResponsesRequest(Sampling):
    input: Text | list[dict[str, Any]] = Field(min_length=1)
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1_000_000)
    text: dict[str, Any] | None = None  # its format
    previous_response_id: str | None = None

    @model_validator(mode="after")
    def _alone(self):
        if self.previous_response_id:
            raise ValueError("previous_response_id is not supported: nothing is kept; send the whole conversation")
        if ((self.text or {}).get("format") or {}).get("type", "text") != "text":
            raise ValueError("text.format is not supported: the model keeps to no form")
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
    def wanted_logprobs(self) -> int:
        return -1

    def conversation(self) -> list[dict]:
        """The messages as the renderer takes them. Unusable."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return prompt_of([*first, *(message for item in items for message in _message(item))])


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
    answer: Answer, request: Request, body: ResponsesRequest, model: str, headers: dict[str, str], **extra
):
    """The response to a request, with what is `extra` in it."""
    head = _head(body, model) | extra
    if body.stream:
        return Stream(answer, _events(answer, head), headers)
    await to_the_end(answer, request)
    return JSONResponse(_ended(head, answer), headers=headers)


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
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "truncation": "auto",
        "metadata": {},
        "usage": None,
    }


def _part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(head: dict, status: str, *parts: dict) -> dict:
    id = head["id"].replace("resp", "msg", 1)
    return {"type": "message", "id": id, "status": status, "role": "assistant", "content": list(parts)}


def _ended(head: dict, answer: Answer) -> dict:
    choice, usage = answer.choices[0], answer.usage()
    cut = choice.reason == "length"
    status = "incomplete" if cut else "completed"
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_item(head, status, _part(choice.text))],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


async def _events(answer: Answer, head: dict) -> AsyncIterator[str]:
    numbers = iter(range(1 << 62))

    def event(kind: str, **more) -> str:
        return f"event: {kind}\n" + data({"type": kind, "sequence_number": next(numbers), **more})

    at = {"item_id": _item(head, "")["id"], "output_index": 0, "content_index": 0}
    yield (
        event("response.created", response=head)
        + event("response.in_progress", response=head)
        + event("response.output_item.added", output_index=0, item=_item(head, "in_progress"))
        + event("response.content_part.added", **at, part=_part(""))
    )
    try:
        async for _, parts in answer.shown():
            said = "".join(part.text for part in parts if part.kind == "text")
            if said:
                yield event("response.output_text.delta", **at, delta=said, logprobs=[])
            elif not parts and not answer.ended:
                yield WAITING
    except Stopped as e:
        failed = {**head, "status": "failed", "error": {"code": "server_error", "message": e.detail}}
        yield event("response.failed", response=failed)
        return
    whole = _ended(head, answer)
    text, item = answer.choices[0].text, whole["output"][0]
    yield (
        event("response.output_text.done", **at, text=text, logprobs=[])
        + event("response.content_part.done", **at, part=_part(text))
        + event("response.output_item.done", output_index=0, item=item)
        + event(f"response.{whole['status']}", response=whole)
    )

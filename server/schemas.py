"""What the API takes and gives: OpenAI's chat completions and completions. An unknown field is refused, not ignored."""

import functools
from abc import abstractmethod
from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

MAX_MESSAGES = 500
MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_LOGPROBS = 20
NEW_TOKENS = 256  # where a request does not say
CALCULATOR = "are not supported: the model has a calculator of its own, and no others"
UNSUPPORTED = {
    "tools": f"tools {CALCULATOR}",
    "tool_choice": f"tools {CALCULATOR}",
    "functions": f"functions {CALCULATOR}",
    "logit_bias": "logit_bias is not supported",
    "best_of": "best_of is not supported; ask for several with n",
    "echo": "echo is not supported: the answer is what follows the prompt",
    "suffix": "suffix is not supported: the model goes on from the end of the prompt",
}


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"not valid Unicode: a lone surrogate at character {e.start}") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(max_length=500)]


class Strict(BaseModel):
    """Takes exactly what it declares: no other fields, no number as a string."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class AssistantPart(Strict):
    type: Literal["text", "python", "python_output"]
    text: Text


class ToolCall(Strict):
    name: str
    input: str
    output: str


class TextMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: Text | list[TextPart]


class AssistantMessage(Strict):
    """What the model said, as a string or in the parts it said it in. `tool` may come back from an answer, unread."""

    role: Literal["assistant"]
    content: Text | list[AssistantPart]
    tool: list[ToolCall] | None = None


Message = Annotated[TextMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]  # a small model keeps to no schema


class Sampling(Strict):
    """What both kinds of request share. null stands for a field's default, as clients send it."""

    model: str | None = None  # there is one model, whatever this says
    n: int | None = Field(1, ge=1, le=8)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(NEW_TOKENS, ge=1, le=1_000_000)
    temperature: float | None = Field(0.6, ge=0, le=2)  # 0: greedy
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(50, ge=0, le=1_000_000)  # 0: all; not OpenAI's
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(0, ge=0, le=0)  # taken where they change nothing
    frequency_penalty: float | None = Field(0, ge=0, le=0)
    user: str | None = None  # taken from OpenAI's clients; nothing is kept
    metadata: dict[str, str] | None = None
    store: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data):
        if not isinstance(data, dict):
            return data
        for name in data:
            if name in UNSUPPORTED and name not in cls.model_fields:
                raise ValueError(UNSUPPORTED[name])
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}

    @model_validator(mode="after")
    def _bounded(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream")
        if self.store:
            raise ValueError("store is not supported: nothing is kept")
        if (chars := self.chars()) > MAX_CHARS:
            raise ValueError(f"the text is {chars} characters long; {MAX_CHARS} is the limit")
        return self

    @abstractmethod
    def chars(self) -> int:
        """The length of the text to answer."""

    @property
    def limit(self) -> int:
        """New tokens at most."""
        return self.max_tokens or NEW_TOKENS

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int:
        """Of how many likely tokens beside the chosen one; -1: none at all."""

    @property
    def stops(self) -> list[str]:
        """Stop strings; an empty one is none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in given if s]


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)  # OpenAI's new name, which wins
    logprobs: bool | None = False
    top_logprobs: int | None = Field(0, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _top_of_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def chars(self) -> int:
        return sum(len(_text(m.content)) for m in self.messages)

    @property
    def limit(self) -> int:
        return self.max_completion_tokens or super().limit

    @property
    def wanted_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1

    def conversation(self) -> list[dict]:
        """The messages as the renderer takes them: a developer is a system, and only an assistant has parts."""
        out = []
        for m in self.messages:
            role = "system" if m.role == "developer" else m.role
            content = m.model_dump()["content"] if role == "assistant" else _text(m.content)
            out.append({"role": role, "content": content})
        return out


class CompletionRequest(Sampling):
    prompt: Text
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def chars(self) -> int:
        return len(self.prompt)

    @property
    def wanted_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


def _text(content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# ------------------------------------------------ responses: only described here, for the document of the API


def _response(name: str, **fields) -> Any:
    """A model of these fields: each a type, or (type, default) where it may be missing."""
    known: dict[str, Any] = {n: field if isinstance(field, tuple) else (field, ...) for n, field in fields.items()}
    return create_model(name, **known)


_list: Any = functools.partial(GenericAlias, list)  # list[model], of a model that mypy takes for a variable
Ends = Literal["stop", "length"]
Usage = _response("Usage", prompt_tokens=int, completion_tokens=int, total_tokens=int)
WHOLE = {"id": str, "created": int, "model": str, "usage": Usage}
Context = _response("Context", dropped_messages=int, truncated=bool)  # only where the conversation exceeded the context

ChatLogprob = _response("ChatLogprob", token=str, logprob=float, bytes=list[int])
ChatTop = _response("ChatTopLogprob", token=str, logprob=float, bytes=list[int], top_logprobs=_list(ChatLogprob))
ChatLogprobs = _response("ChatLogprobs", content=_list(ChatTop))
Reply = _response("Reply", role=Literal["assistant"], content=str, tool=(list[ToolCall], []))
ChatChoice = _response("ChatChoice", index=int, message=Reply, finish_reason=Ends, logprobs=(ChatLogprobs | None, None))
ChatCompletion = _response(
    "ChatCompletion",
    **WHOLE,
    object=Literal["chat.completion"],
    choices=_list(ChatChoice),
    context=(Context | None, None),
)

Likely = list[dict[str, float]]
TextLogprobs = _response(
    "TextLogprobs", tokens=list[str], token_logprobs=list[float], top_logprobs=Likely, text_offset=list[int]
)
TextChoice = _response("TextChoice", index=int, text=str, finish_reason=Ends, logprobs=(TextLogprobs | None, None))
TextCompletion = _response("TextCompletion", **WHOLE, object=Literal["text_completion"], choices=_list(TextChoice))

Model = _response("Model", id=str, object=Literal["model"], created=int, owned_by=str)
ModelList = _response("ModelList", object=Literal["list"], data=_list(Model))
Suggestion = _response("Suggestion", kind=str, text=str)
Health = _response(
    "Health",
    status=Literal["ok", "failed"],
    run=str,
    stage=str,
    suggestions=(_list(Suggestion), []),
    slots=int,
    active=int,
    queued=int,
)
Ready = _response("Ready", status=Literal["ready"])
ErrorDetail = _response("ErrorDetail", message=str, type=str, param=str | None, code=str | None)
Error = _response("Error", error=ErrorDetail)

"""What the API takes and gives: OpenAI's chat completions and completions.

What asks for nothing (null, an empty list, false) changes nothing. A field that is not known is left out and named in
the reply's header. What would change the meaning of the answer and cannot be done is refused.
"""

import functools
import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from nanochat_jax.chats import prompt_of
from nanochat_jax.engine.sampling import Shaping
from server import tools
from tokenizer import SPECIAL_TOKENS
from tokenizer.chat import render_prompt

MAX_MESSAGES = 500
MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_LOGPROBS = 20
NEW_TOKENS = 256  # where a request does not say
REFUSED = {  # what cannot be done, unless it asks for nothing: field -> (values that may stand there, what to say)
    "tool_choice": (("auto", "none"), "tools are called in chats and responses"),
    "function_call": (("auto", "none"), "its newer name is tool_choice"),
    "modalities": ((["text"],), "text is all that it says"),
    "audio": ((), "text is all that it says"),
    "best_of": ((1,), "ask for several with n"),
    "suffix": ((), "the model goes on from the end of the prompt"),
}


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"not valid Unicode: a lone surrogate at character {e.start}") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[Text, Field(max_length=500)]


class Lenient(BaseModel):
    """No number as a string; null stands for a field's default, as clients send it."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data):
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}

    def unknown(self) -> list[str]:
        """The names of fields that are not known, where they ask for something."""
        extra = (self.model_extra or {}).items()
        own = [name for name, value in extra if value and value not in REFUSED.get(name, ((),))[0]]
        within = ((field, getattr(self, field)) for field in type(self).model_fields)
        inner = ((field, v) for field, value in within for v in (value if isinstance(value, list) else [value]))
        return own + sorted({f"{field}.{name}" for field, v in inner if isinstance(v, Lenient) for name in v.unknown()})


def length_of(content: Any) -> int:
    """Characters of what a message holds: a text, or parts with texts."""
    if isinstance(content, list):
        return sum(length_of(part.get("text", "") if isinstance(part, dict) else part) for part in content)
    return len(content) if isinstance(content, str) else 0


class Message(Lenient):
    """A turn of anybody; what may stand in it, `chats.prompt_of` knows."""

    role: str
    content: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None
    reasoning_content: Any = None  # what the assistant thought, also by the next two names
    reasoning: Any = None
    thinking: Any = None
    name: Any = None
    tool: Any = None  # the calculator's calls, which come back from an answer and are not read


class StreamOptions(Lenient):
    include_usage: bool = False


class Sampling(Lenient):
    model: str | None = None  # there is one model, whatever this says
    n: int | None = Field(1, ge=1, le=8)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(NEW_TOKENS, ge=1, le=1_000_000)
    temperature: float | None = Field(0.6, ge=0, le=2)  # 0: greedy
    top_p: float | None = Field(1.0, ge=0, le=1)
    top_k: int | None = Field(50, ge=0, le=1_000_000)  # 0: all; not OpenAI's
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(1.0, ge=0.1, le=10)  # this one and min_p are vLLM's
    min_p: float | None = Field(0.0, ge=0, le=1)
    response_format: Any = None  # text, or JSON of some form
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,7}$")], Bias] | None = Field(None, max_length=1024)

    @model_validator(mode="after")
    def _bounded(self):
        for name, (admitted, why) in REFUSED.items():
            value = (self.model_extra or {}).get(name)
            if value and value not in admitted:
                raise ValueError(f"{name} is not supported: {why}")
        if (chars := self.chars()) > MAX_CHARS:
            raise ValueError(f"the text is {chars} characters long; {MAX_CHARS} is the limit")
        _ = self.calls, self.schema_wanted
        return self

    @abstractmethod
    def chars(self) -> int:
        """The length of the text to answer."""

    @property
    def limit(self) -> int:
        """New tokens at most."""
        return self.max_tokens or NEW_TOKENS

    @property
    def calls(self) -> dict[str, dict] | None:
        """The functions of which one has to be called, {name: schema of its arguments}; None where none has to."""
        return None

    @property
    def schema_wanted(self) -> Any:
        """The JSON schema that the answer keeps to; None for text."""
        return tools.schema_of(self.response_format)

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int:
        """Of how many likely tokens beside the chosen one; -1: none at all."""

    @property
    def shaping(self) -> Shaping | None:
        bias = tuple((int(id), value) for id, value in (self.logit_bias or {}).items() if value)
        penalties = self.presence_penalty or 0.0, self.frequency_penalty or 0.0, self.repetition_penalty or 1.0
        wanted = Shaping(*penalties, self.min_p or 0.0, bias)
        return None if wanted == Shaping() else wanted

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in given if s]


THINKING = (  # fields that say how much to think, whether to, and in how many tokens
    ("reasoning_effort", "reasoning.effort"),
    ("enable_thinking", "chat_template_kwargs.enable_thinking"),
    ("thinking_budget", "chat_template_kwargs.thinking_budget"),
)


class Conversing(Sampling):
    """What chat completions and responses share: a conversation, functions that may be called, and whether to think."""

    tools: list[Any] | None = None
    tool_choice: Any = None
    reasoning_effort: Any = None
    reasoning: dict[str, Any] | None = None  # {"effort"}, as responses have it
    enable_thinking: bool | None = None  # Qwen's
    thinking_budget: int | None = Field(None, ge=0)  # tokens; Qwen's
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's, of which enable_thinking and thinking_budget are read

    @model_validator(mode="after")
    def _known_effort(self):
        _ = self.functions, self.thinking(0)
        return self

    @property
    def functions(self) -> list[dict]:
        return tools.offered(self.tool_choice, self.tools)

    @property
    def calls(self) -> dict[str, dict] | None:
        return tools.required(self.tool_choice, self.tools)

    def _of_thinking(self) -> dict[str, Any]:
        """Fields that say whether to think, by their names, where they say something."""
        given = {name: getattr(self, name) for name in ("reasoning_effort", "enable_thinking", "thinking_budget")}
        given |= {f"reasoning.{name}": value for name, value in (self.reasoning or {}).items()}
        given |= {f"chat_template_kwargs.{name}": value for name, value in (self.chat_template_kwargs or {}).items()}
        return {name: value for name, value in given.items() if value is not None}

    def thinking(self, context: int) -> bool | int:
        """Whether to think first, where text may be the answer; a number: in so many tokens. ValueError."""
        given = self._of_thinking()
        effort, on, budget = (next((given[n] for n in names if n in given), None) for names in THINKING)
        return tools.thinking(effort or None, on, budget, context)

    @property
    def is_free(self) -> bool:
        """Text may be the answer."""
        return self.calls is None and self.schema_wanted is None

    def unknown(self) -> list[str]:
        """Also tools that are no functions, and what asks for thoughts where there is no place for them."""
        others = [f"tools.{name}" for name in tools.not_offered(self.tool_choice, self.tools)]
        known = set(itertools.chain(*THINKING)) if self.is_free or not self.thinking(0) else set()
        asked = (name for name, value in self._of_thinking().items() if value not in (False, 0, "", "none"))
        return [*others, *(name for name in asked if name not in known), *super().unknown()]

    @abstractmethod
    def said(self) -> list[dict]:
        """The messages of the request. Unusable."""

    def conversation(self, functions: Sequence[Mapping], thinking: bool | int, notes: set[str]) -> list[dict]:
        """The messages as the renderer takes them, with a system message that tells of tools and thinking; `notes`
        names what it cannot tell. Unusable."""
        return prompt_of(self.said(), functions, thinking, notes)


class ChatRequest(Conversing):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)  # OpenAI's new name, which wins
    logprobs: bool | None = False
    top_logprobs: int | None = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _top_of_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def chars(self) -> int:
        return sum(length_of(m.content) for m in self.messages)

    @property
    def limit(self) -> int:
        return self.max_completion_tokens or super().limit

    @property
    def wanted_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1

    def said(self) -> list[dict]:
        return [m.model_dump(exclude_none=True) for m in self.messages]


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
MAX_PROMPTS = 128


class CompletionRequest(Sampling):
    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: int | None = Field(NEW_TOKENS, ge=0, le=1_000_000)  # 0 is for echo
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False  # the prompt comes back before what follows it, with its log-probabilities

    @model_validator(mode="after")
    def _whole(self):
        if self.echo and self.stream:
            raise ValueError("echo is not supported in a stream")
        return self

    @property
    def is_scored(self) -> bool:
        """Nothing is to be generated, but for one token after an echo, which scoring tells as well."""
        one = self.limit == 1 and self.temperature == 0 and self.schema_wanted is None
        return self.limit == 0 or bool(self.echo and one)

    @property
    def given(self) -> list:
        """The prompts, each a text or ids."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if alone else list(self.prompt)

    def chars(self) -> int:
        return sum(map(len, self.given))

    def prompts(self, tok) -> list[list[int]]:
        """The ids of each prompt, behind one <|bos|>. ValueError for an id that there is not."""
        found = [tok.encode(one) if isinstance(one, str) else one for one in self.given]
        if max(map(max, filter(None, found)), default=0) >= tok.vocab_size:
            raise ValueError(f"prompt: ids go up to {tok.vocab_size - 1}")
        return [ids if ids[:1] == [tok.bos] else [tok.bos, *ids] for ids in found]

    @property
    def limit(self) -> int:
        return NEW_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


class Tokenize(Lenient):
    """Text, or a conversation, to ids; as vLLM has it."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = True

    def ids(self, tok) -> list[int]:
        """The name of a special token alone is that token: lm-eval asks for those that /tokenizer_info names."""
        if self.messages is not None:
            return render_prompt(tok, prompt_of([m.model_dump(exclude_none=True) for m in self.messages]))
        prompt = self.prompt or ""
        if prompt in SPECIAL_TOKENS:
            return [getattr(tok, prompt[2:-2])]
        return [*([tok.bos] if self.add_special_tokens else []), *tok.encode(prompt)]


class Detokenize(Lenient):
    tokens: list[Annotated[int, Field(ge=0)]]


# ------------------------------------------------ responses: only described here, for the document of the API


def _response(title: str, /, **fields) -> Any:
    """A model of these fields: each a type, or (type, default) where it may be missing."""
    known: dict[str, Any] = {n: field if isinstance(field, tuple) else (field, ...) for n, field in fields.items()}
    return create_model(title, **known)


_list: Any = functools.partial(GenericAlias, list)  # list[model], of a model that mypy takes for a variable
Ends = Literal["stop", "length", "tool_calls"]
Details = _response("UsageDetails", reasoning_tokens=int)
Usage = _response(
    "Usage",
    prompt_tokens=int,
    completion_tokens=int,
    total_tokens=int,
    completion_tokens_details=(Details | None, None),
)
WHOLE = {"id": str, "created": int, "model": str, "usage": Usage}
Context = _response("Context", dropped_messages=int, truncated=bool)  # only where the conversation exceeded the context

Function = _response("Function", name=str, arguments=str)
ToolCall = _response("ToolCall", id=str, type=Literal["function"], function=Function)
Calculated = _response("Calculated", index=int, name=str, input=str, output=str)
ChatLogprob = _response("ChatLogprob", token=str, logprob=float, bytes=list[int])
ChatTop = _response("ChatTopLogprob", token=str, logprob=float, bytes=list[int], top_logprobs=_list(ChatLogprob))
ChatLogprobs = _response("ChatLogprobs", content=_list(ChatTop))
Reply = _response(
    "Reply",
    role=Literal["assistant"],
    content=str | None,
    reasoning_content=(str | None, None),
    tool=(_list(Calculated), []),
    tool_calls=(_list(ToolCall), []),
)
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
OutputText = _response("OutputText", type=Literal["output_text"], text=str, annotations=list, logprobs=list)
OutputMessage = _response(
    "OutputMessage", type=Literal["message"], id=str, status=str, role=Literal["assistant"], content=_list(OutputText)
)
Thought = _response("ReasoningText", type=Literal["reasoning_text"], text=str)
OutputReasoning = _response(
    "OutputReasoning", type=Literal["reasoning"], id=str, status=str, summary=list, content=_list(Thought)
)
OutputCall = _response(
    "OutputCall", type=Literal["function_call"], id=str, status=str, call_id=str, name=str, arguments=str
)
Response = _response(
    "Response",
    id=str,
    object=Literal["response"],
    created_at=int,
    status=Literal["completed", "incomplete"],
    model=str,
    output=_list(OutputReasoning | OutputMessage | OutputCall),
    usage=dict[str, Any],
)
Tokens = _response("Tokens", tokens=list[int], count=int, max_model_len=int)
Detokenized = _response("Detokenized", prompt=str)
TokenizerInfo = _response("TokenizerInfo", bos_token=str, eos_token=str, pad_token=str, vocab_size=int)
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
Ready = _response("Ready", status=Literal["ready"], compiled=bool)
ErrorDetail = _response("ErrorDetail", message=str, type=str, param=str | None, code=str | None)
Error = _response("Error", error=ErrorDetail)

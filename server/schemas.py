"""What the API takes: a part of OpenAI's chat completions. A field that is not here is refused, not ignored."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_MESSAGES = 500
MAX_CHARS = 200_000  # of all messages together


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None  # accepted for OpenAI's clients; there is one model
    stream: bool = False
    temperature: float = Field(0.6, ge=0, le=2)  # 0: greedy
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(50, ge=0, le=1000)  # 0: all
    max_tokens: int = Field(256, ge=1, le=8192)
    seed: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _bounded(self):
        chars = sum(len(m.content) for m in self.messages)
        if chars > MAX_CHARS:
            raise ValueError(f"the messages are {chars} characters long; {MAX_CHARS} is the limit")
        return self

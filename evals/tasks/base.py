"""What a task is: questions as conversations, a verdict on an answer, and the accuracy of guessing."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from nanochat_jax.data.split import HELD_OUT, held_out
from nanochat_jax.engine.dialogue import Caller
from nanochat_jax.errors import UserError
from nanochat_jax.formats import opened_parquet


class Task(ABC):
    """len, and [i] -> {"messages": [...], ...}, whose last message is the reference answer of the assistant.

    kind: categorical (the conversation has "letters", the answer is one of them), generative (the answer is free
    text), or conversation (nothing to score).

    files: what its rows are made of, where those are local files. key: plain data that names what else they are made
    of, but for the code. notes: lines on what was made of its rows.
    """

    name: str
    kind: str
    files: Sequence[Path] = ()
    key: list = []
    notes: tuple[str, ...] = ()
    _rows: Sequence = ()  # what the conversations are made of, one each

    def __len__(self) -> int:
        return len(self._rows)

    @abstractmethod
    def __getitem__(self, i: int) -> dict: ...


class ScoredTask(Task):
    """A task with a verdict. baseline: the accuracy of guessing.

    lenient: what the lenient score takes for right beside what the strict one does; "" where the two are one.
    """

    baseline: float = 0.0
    lenient: str = ""

    def chance(self, conversations: Sequence[dict]) -> float:
        """The accuracy of guessing on these questions."""
        return self.baseline

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the visible text of a completion is right: by default, whether it is the reference answer."""
        return completion.strip() == conversation["messages"][-1]["content"].strip()

    def judge(self, conversation: dict, completion: str) -> tuple[bool, str]:
        """The verdict and a reason for it, which may be empty: why a program failed, for example."""
        return self.evaluate(conversation, completion), ""

    def caller(self, conversation: dict) -> Caller | None:
        """Who runs the tools that a conversation gives to the model; None where it gives none."""
        return None

    def aspects(self, conversation: dict, said: Sequence[dict]) -> dict[str, bool]:
        """Verdicts by name on what was said, as parts with calls and what came of them; all of them make it right.
        A name may be missing where there is nothing to judge by it."""
        return {}

    def admits(self, conversation: dict, completion: str) -> bool:
        """Whether the lenient score takes an answer for right that the strict one, `evaluate`, takes for wrong."""
        return False

    def reward(self, conversation: dict, said: Sequence[dict]) -> float:
        """What RL maximises, of all that was said, as parts: the lenient verdict."""
        if aspects := self.aspects(conversation, said):
            return float(all(aspects.values()))
        completion = visible(said)
        return float(self.evaluate(conversation, completion) or self.admits(conversation, completion))


class FromRows(ScoredTask):
    """A task whose questions are the rows of a table. UserError where the table lacks one of `columns`, and for a row
    that holds something else than the type that they state, or that `conversation` raises a ValueError for.

    source: where the rows are, for messages.
    """

    columns: Mapping[str, type | tuple[type, ...]]
    source: str = ""

    def __init__(self, rows: Sequence[dict]):
        first = self.unpacked(rows[0]) if len(rows) else self.columns
        if missing := [c for c in self.columns if c not in first]:
            raise UserError(f"the rows of task {self.name} lack {', '.join(missing)}; they have {', '.join(first)}")
        self._rows = rows

    def __getitem__(self, i: int) -> dict:
        row = self.unpacked(self._rows[i])
        try:
            for column, types in self.columns.items():
                if not isinstance(row.get(column), types):
                    raise ValueError(f"{column} is {brief(row.get(column))}")
            conversation = self.conversation(row)
            if not all(message["content"] for message in conversation["messages"]):
                raise ValueError("its question or its answer is empty")
            return conversation
        except ValueError as e:
            where = self.source or f"task {self.name}"
            raise UserError(f"{where}, row {i} (from 0) cannot be asked: {e}; correct it or remove it") from None

    def unpacked(self, row: dict) -> dict:
        return row

    @abstractmethod
    def conversation(self, row: dict) -> dict: ...


class Generated(ScoredTask):
    """A task whose questions a function makes: make(rng) -> conversation. They depend on (split, index) alone.

    A hash of the question decides its split, so that training and test questions are disjoint however many there are.
    """

    sizes = {"train": 20_000, "test": 1_000}
    split_by_text = True  # False: what it makes is of its split already

    def __init__(self, split: str, size: int | None = None):
        self.split, self._rows = split, range(self.sizes[split] if size is None else size)

    def __getitem__(self, i: int) -> dict:
        return self.draw(random.Random(f"{self.name} {self.split} {self._rows[i]}"))

    def draw(self, rng: random.Random) -> dict:
        while True:
            conversation = self.make(rng)
            question = conversation["messages"][0]["content"]
            if not self.split_by_text or held_out(question, HELD_OUT) == (self.split == "test"):
                return conversation

    @abstractmethod
    def make(self, rng: random.Random) -> dict: ...


@cache
def read_yaml(name: str) -> Any:
    """The wordings in a file of this folder. Not to be written to."""
    return yaml.load((Path(__file__).parent / name).read_text(encoding="utf-8"), yaml.CSafeLoader)


def dialogue(*contents: str | list[dict]) -> dict:
    """The conversation in which user and assistant say this in turn."""
    return {"messages": [{"role": r, "content": c} for r, c in zip(cycle(("user", "assistant")), contents)]}


def prompt_messages(conversation: dict) -> list[dict]:
    """A conversation up to its last user turn: what the model is asked."""
    messages = conversation["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def visible(content: str | Sequence[dict]) -> str:
    """The text of a message, without its tool calls."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def brief(value) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def read_rows(path: str | Path) -> Sequence[dict]:
    """The rows of a parquet file, made into dicts when asked for. UserError where it is missing or cannot be read."""
    import datasets

    with opened_parquet(Path(path)) as file:
        return datasets.Dataset(file.read())

"""What a task is: questions as conversations, a verdict on an answer, and what guessing scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat_jax.errors import UserError


class Task(ABC):
    """len, and [i] -> {"messages": [...], ...}, whose last message is the reference answer of the assistant.

    kind: categorical (the conversation has "letters", the answer is one of them), generative (the answer is free
    text), or conversation (nothing to score).
    """

    name: str
    kind: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> dict: ...


class ScoredTask(Task):
    """A task with a verdict. baseline: the accuracy of guessing."""

    baseline: float = 0.0

    @abstractmethod
    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the visible text of a completion is right."""

    def judge(self, conversation: dict, completion: str) -> tuple[bool, str]:
        """The verdict, and what there is to say of it: why a program failed, for example."""
        return self.evaluate(conversation, completion), ""

    def reward(self, conversation: dict, completion: str) -> float:
        """What RL maximises."""
        return float(self.evaluate(conversation, completion))


def prompt_messages(conversation: dict) -> list[dict]:
    """A conversation up to its last user turn: what the model is asked."""
    messages = conversation["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A question with its choices. The letter comes last in its line: there a small model finds it more easily."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


class MultipleChoice(ScoredTask):
    """Rows that `read` turns into (question, letters, choices, the right letter)."""

    kind, baseline = "categorical", 0.25

    def __init__(self, name: str, rows: Sequence[dict]):
        self.name, self._rows = name, rows

    @abstractmethod
    def read(self, row: dict) -> tuple[str, list[str], list[str], str]: ...

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        row = self._rows[i]
        question, letters, choices, answer = self.read(row)
        text = render_multiple_choice(question, letters, choices)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": letters, **self.also(row)}

    def also(self, row: dict) -> dict:
        """What a conversation says of its row beside: {"subject"} where the task has subjects."""
        return {}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]


# ------------------------------------------------------------------------------------------------------ rows


class Table(Sequence):
    """The rows of a pyarrow table as dicts, each made when it is asked for: a tenth of the memory of a list."""

    def __init__(self, table):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> dict:
        place = i + len(self) if i < 0 else i
        if not 0 <= place < len(self):
            raise IndexError(i)
        return self._table.slice(place, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


def read_rows(path: str | Path) -> Table:
    """The rows of a parquet file. UserError where there is none, or it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return Table(pyarrow.parquet.read_table(path))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path} cannot be read as parquet ({str(e).splitlines()[0]}); fetch it again") from None


def check_columns(task: str, rows: Sequence[dict], columns: Sequence[str]) -> None:
    """UserError where the first row, and so the table, lacks a column that the task reads."""
    missing = [c for c in columns if len(rows) and c not in rows[0]]
    if missing:
        raise UserError(f"the rows of task {task} lack {', '.join(missing)}; they have {', '.join(rows[0])}")

"""What a task is: questions as conversations, a verdict on an answer, and what guessing scores."""

from __future__ import annotations

from collections.abc import Sequence


class Task:
    """len, and [i] -> {"messages": [...], ...}, whose last message is the reference answer of the assistant.

    kind: categorical (the conversation has "letters", the answer is one of them), generative (the answer is free
    text), or conversation (nothing to score). baseline: the accuracy of guessing.
    """

    name: str
    kind: str
    baseline: float = 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict:
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the visible text of a completion is right."""
        raise NotImplementedError

    def reward(self, conversation: dict, completion: str) -> float:
        """What RL maximises."""
        return float(self.evaluate(conversation, completion))


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A question with its choices. The letter comes last in its line: there a small model finds it more easily."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


class MultipleChoice(Task):
    """Rows that `read` turns into (question, letters, choices, the right letter)."""

    kind, baseline = "categorical", 0.25

    def __init__(self, name: str, rows: Sequence[dict]):
        self.name, self._rows = name, rows

    def read(self, row: dict) -> tuple[str, list[str], list[str], str]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        question, letters, choices, answer = self.read(self._rows[i])
        text = render_multiple_choice(question, letters, choices)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": letters}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]

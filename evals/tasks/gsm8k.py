"""GSM8K: grade-school word problems whose answers call a calculator. Cobbe et al., arXiv 2110.14168."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evals.tasks.base import ScoredTask, check_columns

_CALL = re.compile(r"<<([^>]+)>>")
_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def parse_parts(answer: str) -> list[dict]:
    """An answer with `<<12*3=36>>` in it as text, python and python_output parts."""
    parts = []
    for i, piece in enumerate(_CALL.split(answer)):
        if i % 2:
            expression, equals, result = piece.rpartition("=")
            if not equals:  # a call without its result
                expression, result = piece, ""
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def extract_answer(text: str) -> str | None:
    """The number after the first `#### `, without its commas, or None."""
    found = _ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def same_answer(completion: str, answer: str | None) -> bool:
    """Whether a completion gives the number `answer`, which stands there without commas."""
    return answer is not None and extract_answer(completion) == answer


class GSM8K(ScoredTask):
    """Rows with `question` and `answer`."""

    name, kind, baseline = "gsm8k", "generative", 0.0

    def __init__(self, rows: Sequence[dict]):
        check_columns(self.name, rows, ("question", "answer"))
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        row = self._rows[i]
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": parse_parts(row["answer"])},
        ]
        return {"messages": messages, "answer": extract_answer(row["answer"])}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the extracted strings are equal: 18 is not 18.00, as in the published scores."""
        return same_answer(completion, conversation["answer"])

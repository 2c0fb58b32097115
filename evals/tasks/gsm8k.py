"""GSM8K: grade-school word problems whose answers call a calculator. Cobbe et al., arXiv 2110.14168."""

import re

from evals.tasks.base import FromRows, ScoredTask, dialogue

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


class NumberAnswer(ScoredTask):
    """A task whose conversations have the "answer" that a completion must give after `#### `."""

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the strings are equal: 18 is not 18.00, as in the published scores."""
        answer = conversation["answer"]
        return answer is not None and extract_answer(completion) == answer


class GSM8K(NumberAnswer, FromRows):
    """Rows with `question` and `answer`."""

    name, kind = "gsm8k", "generative"
    columns = ("question", "answer")

    def conversation(self, row: dict) -> dict:
        return dialogue(row["question"], parse_parts(row["answer"])) | {"answer": extract_answer(row["answer"])}

"""GSM8K: grade-school word problems whose answers call a calculator. Cobbe et al., arXiv 2110.14168."""

import re
from decimal import Decimal

from evals.tasks.base import FromRows, ScoredTask, dialogue, visible

_CALL = re.compile(r"<<([^>]+)>>")
_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_LENIENT = re.compile(
    r"####[\W_]{0,16}?(?:(?:the |final )*answer\b(?: is\b)?|boxed\b)?[\W_]{0,16}?"
    r"(?P<sign>[-\u2212][$€£]?)?(?P<number>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)",
    re.IGNORECASE,
)


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


def extract_number(text: str) -> Decimal | None:
    """The value of the first number after `####`, whatever signs stand between and beside them, or None."""
    if not (found := _LENIENT.search(text)):
        return None
    value = Decimal(found["number"].replace(",", ""))
    return -value if found["sign"] else value


class NumberAnswer(ScoredTask):
    """A task whose conversations have the "answer" that a completion must give after `#### `, as the reference does."""

    lenient = "numbers after `####` that are equal in value: 72. and $72, ####72 and **72**, 72.00 and +72 are 72"

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the strings are equal: 18 is not 18.00, as in the published scores."""
        answer = conversation["answer"]
        return answer is not None and extract_answer(completion) == answer

    def admits(self, conversation: dict, completion: str) -> bool:
        wanted = extract_number(visible(conversation["messages"][-1]["content"]))
        return wanted is not None and extract_number(completion) == wanted


class GSM8K(NumberAnswer, FromRows):
    name, kind = "gsm8k", "generative"
    columns = {"question": str, "answer": str}

    def conversation(self, row: dict) -> dict:
        return dialogue(row["question"], parse_parts(row["answer"])) | {"answer": extract_answer(row["answer"])}

"""Whether an answer in free words is right: the number that it ends with, the letters that it spells, words in it."""

import re
from collections.abc import Callable
from typing import Any

from evals.tasks.base import ScoredTask
from nanochat_jax.data import stories

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBER = re.compile(rf"-?\d[\d,]*(?:\.\d+)?|\b(?:{'|'.join(NUMBERS)})\b")


def holds(check: dict, answer: str) -> bool:
    """Whether an answer meets every part of a check.

    number: the last number in it. spelled: the letters of a word in order, apart. any, all, none: words or phrases of
    which at least one, all, none occur. story: slots that a story must have (`stories.problems`).
    """
    text = answer.lower()
    return all(_PARTS[part](wanted, text if part != "story" else answer) for part, wanted in check.items())


def _number(wanted: float, text: str) -> bool:
    found = _NUMBER.findall(text)
    if not found:
        return False
    last = found[-1].replace(",", "")
    return abs((NUMBERS.index(last) if last in NUMBERS else float(last)) - wanted) < 1e-6


def _spelled(wanted: str, text: str) -> bool:
    return re.search(r"(?<![a-z])" + r"[\s,.\-]+".join(wanted) + r"(?![\s,.\-]+[a-z](?![a-z])|[a-z])", text) is not None


def _occurs(phrase: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(phrase.lower())}(?!\w)", text.replace("’", "'")) is not None


_PARTS: dict[str, Callable[[Any, str], bool]] = {
    "number": _number,
    "spelled": _spelled,
    "any": lambda wanted, text: any(_occurs(phrase, text) for phrase in wanted),
    "all": lambda wanted, text: all(_occurs(phrase, text) for phrase in wanted),
    "none": lambda wanted, text: not any(_occurs(phrase, text) for phrase in wanted),
    "story": lambda given, answer: not stories.problems(answer, given),
}


class Checked(ScoredTask):
    """A task whose conversations carry the check of a right answer."""

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return holds(conversation["check"], completion)

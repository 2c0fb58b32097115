"""Tasks that the project makes itself, for a model that trains without a network: what they share, and arithmetic.

Questions are functions of (split, index). Which split a question belongs to is decided by a hash of its text, so that
training and test questions are disjoint whatever their number.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Callable

from evals.tasks.base import ScoredTask
from evals.tasks.gsm8k import extract_answer, parse_parts

TEST_SHARE = 10  # every so manieth question, by its hash, is a test question
SIZES = {"train": 20_000, "test": 1_000}
NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria", "Nina",
    "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tina", "Victor", "Wendy",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles", "plums", "stickers", "buttons", "eggs",
)  # fmt: skip


def is_test(question: str) -> bool:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % TEST_SHARE == 0


class Generated(ScoredTask):
    """A task whose questions a function makes: make(rng) -> conversation."""

    def __init__(self, split: str, size: int | None = None):
        self.split, self._size = split, SIZES[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self._size:
            raise IndexError(i)
        rng = random.Random(f"{self.name} {self.split} {i}")
        while True:
            conversation = self.make(rng)
            if is_test(conversation["messages"][0]["content"]) == (self.split == "test"):
                return conversation

    @abstractmethod
    def make(self, rng: random.Random) -> dict: ...


# ------------------------------------------------------------------------------------------------ arithmetic


def _gain(rng):
    a, b, n, m, t = rng.randint(3, 99), rng.randint(3, 99), *rng.sample(NAMES, 2), rng.choice(THINGS)
    question = rng.choice(
        (
            f"{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
            f"{n} found {a} {t} on Monday and {b} {t} on Tuesday. How many {t} did {n} find in all?",
            f"There are {a} {t} in the box and {b} {t} on the table. How many {t} are there together?",
        )
    )
    return question, f"The sum is <<{a}+{b}={a + b}>>{a + b} {t}.\n#### {a + b}"


def _loss(rng):
    b, n, m, t = rng.randint(2, 60), *rng.sample(NAMES, 2), rng.choice(THINGS)
    a = b + rng.randint(2, 39)
    question = rng.choice(
        (
            f"{n} has {a} {t} and gives {b} of them to {m}. How many {t} are left?",
            f"A shop had {a} {t} and sold {b}. How many {t} does it still have?",
            f"{n} had {a} {t} but lost {b} of them. How many {t} does {n} have now?",
        )
    )
    return question, f"That leaves <<{a}-{b}={a - b}>>{a - b} {t}.\n#### {a - b}"


def _groups(rng):
    a, b, n, t = rng.randint(2, 20), rng.randint(2, 20), rng.choice(NAMES), rng.choice(THINGS)
    question = rng.choice(
        (
            f"{n} has {a} boxes with {b} {t} in each. How many {t} does {n} have?",
            f"A bag holds {b} {t}. How many {t} are in {a} bags?",
            f"{n} buys {b} {t} every day for {a} days. How many {t} does {n} buy?",
        )
    )
    x, y = (a, b) if question.startswith(f"{n} has") else (b, a)
    return question, f"That makes <<{x}*{y}={a * b}>>{a * b} {t}.\n#### {a * b}"


def _shares(rng):
    b, c, n, t = rng.randint(2, 12), rng.randint(2, 20), rng.choice(NAMES), rng.choice(THINGS)
    a = b * c
    question = rng.choice(
        (
            f"{n} shares {a} {t} equally among {b} friends. How many {t} does each friend get?",
            f"{a} {t} are packed into {b} equal boxes. How many {t} are in each box?",
        )
    )
    return question, f"Each gets <<{a}//{b}={c}>>{c} {t}.\n#### {c}"


def _two_steps(rng):
    a, b, c, n, t = rng.randint(2, 12), rng.randint(3, 12), rng.randint(2, 20), rng.choice(NAMES), rng.choice(THINGS)
    total = a * b
    if rng.random() < 0.5 and c < total:
        question = f"{n} buys {a} packs of {b} {t} and loses {c} {t}. How many {t} does {n} have left?"
        sign, result = "-", total - c
    else:
        question = f"{n} buys {a} packs of {b} {t} and finds {c} more {t}. How many {t} does {n} have?"
        sign, result = "+", total + c
    return question, (
        f"The packs hold <<{a}*{b}={total}>>{total} {t}.\n"
        f"Then there are <<{total}{sign}{c}={result}>>{result} {t}.\n#### {result}"
    )


class Arithmetic(Generated):
    """Word problems of one or two steps, answered in GSM8K's format with calls of the calculator."""

    name, kind, baseline = "arithmetic", "generative", 0.0
    templates: tuple[Callable, ...] = (_gain, _loss, _groups, _shares, _two_steps)

    def make(self, rng: random.Random) -> dict:
        question, answer = rng.choice(self.templates)(rng)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parse_parts(answer)}]
        return {"messages": messages, "answer": extract_answer(answer)}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return extract_answer(completion) == conversation["answer"]

"""Arithmetic: word problems made here, for a model that trains without a network. GSM8K's format, and its calculator.

Each template draws numbers and names, and gives a question and its answer.
"""

import random

from evals.tasks.base import Generated, dialogue
from evals.tasks.gsm8k import NumberAnswer, extract_answer, parse_parts

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria", "Nina",
    "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tina", "Victor", "Wendy",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles", "plums", "stickers", "buttons", "eggs",
)  # fmt: skip


def _gain(rng: random.Random) -> tuple[str, str]:
    a, b, n, m, t = rng.randint(3, 99), rng.randint(3, 99), *rng.sample(NAMES, 2), rng.choice(THINGS)
    questions = (
        f"{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
        f"{n} found {a} {t} on Monday and {b} {t} on Tuesday. How many {t} did {n} find in all?",
        f"There are {a} {t} in the box and {b} {t} on the table. How many {t} are there together?",
    )
    return rng.choice(questions), f"The sum is <<{a}+{b}={a + b}>>{a + b} {t}.\n#### {a + b}"


def _loss(rng: random.Random) -> tuple[str, str]:
    b, n, m, t = rng.randint(2, 60), *rng.sample(NAMES, 2), rng.choice(THINGS)
    a = b + rng.randint(2, 39)
    questions = (
        f"{n} has {a} {t} and gives {b} of them to {m}. How many {t} are left?",
        f"A shop had {a} {t} and sold {b}. How many {t} does it still have?",
        f"{n} had {a} {t} but lost {b} of them. How many {t} does {n} have now?",
    )
    return rng.choice(questions), f"That leaves <<{a}-{b}={a - b}>>{a - b} {t}.\n#### {a - b}"


def _groups(rng: random.Random) -> tuple[str, str]:
    a, b, n, t = rng.randint(2, 20), rng.randint(2, 20), rng.choice(NAMES), rng.choice(THINGS)
    questions = (
        f"{n} has {a} boxes with {b} {t} in each. How many {t} does {n} have?",
        f"A bag holds {b} {t}. How many {t} are in {a} bags?",
        f"{n} buys {b} {t} every day for {a} days. How many {t} does {n} buy?",
    )
    question = rng.choice(questions)
    x, y = (a, b) if question == questions[0] else (b, a)
    return question, f"That makes <<{x}*{y}={a * b}>>{a * b} {t}.\n#### {a * b}"


def _shares(rng: random.Random) -> tuple[str, str]:
    b, c, n, t = rng.randint(2, 12), rng.randint(2, 20), rng.choice(NAMES), rng.choice(THINGS)
    a = b * c
    questions = (
        f"{n} shares {a} {t} equally among {b} friends. How many {t} does each friend get?",
        f"{a} {t} are packed into {b} equal boxes. How many {t} are in each box?",
    )
    return rng.choice(questions), f"Each gets <<{a}//{b}={c}>>{c} {t}.\n#### {c}"


def _two_steps(rng: random.Random) -> tuple[str, str]:
    a, b, c, n, t = rng.randint(2, 12), rng.randint(3, 12), rng.randint(2, 20), rng.choice(NAMES), rng.choice(THINGS)
    total = a * b
    if rng.random() < 0.5 and c < total:
        question = f"{n} buys {a} packs of {b} {t} and loses {c} {t}. How many {t} does {n} have left?"
        sign, result = "-", total - c
    else:
        question = f"{n} buys {a} packs of {b} {t} and finds {c} more {t}. How many {t} does {n} have?"
        sign, result = "+", total + c
    first = f"The packs hold <<{a}*{b}={total}>>{total} {t}."
    return question, f"{first}\nThen there are <<{total}{sign}{c}={result}>>{result} {t}.\n#### {result}"


class Arithmetic(NumberAnswer, Generated):
    """Word problems of one or two steps."""

    name, kind = "arithmetic", "generative"
    templates = (_gain, _loss, _groups, _shares, _two_steps)

    def make(self, rng: random.Random) -> dict:
        question, answer = rng.choice(self.templates)(rng)
        return dialogue(question, parse_parts(answer)) | {"answer": extract_answer(answer)}

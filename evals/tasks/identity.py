"""Conversations about who the model is and what it can do, so that a model trained without a network can say so."""

import random

from evals.tasks.base import Task, dialogue, read_yaml

SIZE = 4_000


class Identity(Task):
    """Pairs of identity.yaml with small changes of case and punctuation, some of two turns."""

    name, kind = "identity", "conversation"
    _rows = range(SIZE)

    def __getitem__(self, i: int) -> dict:
        rng = random.Random(f"identity {self._rows[i]}")
        turns: list[str] = []
        for _ in range(1 if rng.random() < 0.8 else 2):
            questions, answers = rng.choice(read_yaml("identity.yaml")).values()
            turns += (_vary(rng, rng.choice(questions)), rng.choice(answers))
        return dialogue(*turns)


def _vary(rng: random.Random, text: str) -> str:
    if rng.random() < 0.2:
        text = text.lower()
    return text.rstrip("?!.") if rng.random() < 0.15 else text

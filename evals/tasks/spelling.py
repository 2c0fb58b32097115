"""Spelling: what tokens hide from a model. Spell a word, and count a letter in it (SpellingBee).

The answer to a count spells the word, counts by hand, and then asks the calculator, so that the model learns both
ways and to trust the second. Words of the test split are never among those of training.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

from evals.tasks.base import Task
from evals.tasks.gsm8k import extract_answer

TEST_SHARE = 10  # every so manieth word, by its hash, is for the test split
QUESTIONS = (
    "How many {l} are in {w}",
    "How many {l} are in the word {w}",
    "How many times does {l} appear in {w}",
    "How often does the letter {l} occur in {w}",
    "Count the letter {l} in {w}",
    "Count the number of {l} in the word {w}",
    "What is the number of {l} in {w}",
    "In the word {w}, how many {l} are there",
    "Tell me how many {l} the word {w} has",
    "{w}: how many {l}",
)
SPELL = ("Spell the word {w}", "Spell {w}", "How do you spell {w}", "Please spell the word {w} letter by letter")
QUOTES = ("", "'", '"')


def _held_out(word: str) -> bool:
    return hashlib.sha256(word.encode()).digest()[0] % TEST_SHARE == 0


class _OnWords(Task):
    """Questions about words of a split, in an order and with a wording that depend on the index alone."""

    def __init__(self, words: Sequence[str], split: str, size: int):
        chosen = sorted({w for w in words if _held_out(w) == (split == "test")})
        if not chosen:
            raise ValueError(f"no {split} words for {self.name}")
        self._words, self.split, self._size = chosen, split, size

    def __len__(self) -> int:
        return self._size

    def _draw(self, i: int) -> tuple[random.Random, str]:
        if not 0 <= i < self._size:
            raise IndexError(i)
        rng = random.Random(f"{self.name} {self.split} {i}")
        return rng, rng.choice(self._words)


def _ask(rng: random.Random, templates: Sequence[str], **values: str) -> str:
    text = rng.choice(templates).format(**values)
    text = text[0].lower() + text[1:] if rng.random() < 0.2 else text
    return text + rng.choice(("?", "?", ""))


class SpellingBee(_OnWords):
    """How many times a letter occurs in a word."""

    name, kind, baseline = "spellingbee", "generative", 0.0

    def __getitem__(self, i: int) -> dict:
        rng, word = self._draw(i)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        mark = rng.choice(QUOTES)
        question = _ask(rng, QUESTIONS, w=f"{mark}{word}{mark}", l=f"{mark}{letter}{mark}")
        lines, seen = [], 0
        for place, c in enumerate(word, 1):
            seen += c == letter
            lines.append(f"{place}:{c}" + (f" ({seen})" if c == letter else ""))
        expression = f"'{word}'.count('{letter}')"
        answer = [
            {"type": "text", "text": f"{','.join(word)}\n" + "\n".join(lines) + f"\nThat makes {seen}. To check: "},
            {"type": "python", "text": expression},
            {"type": "python_output", "text": str(seen)},
            {"type": "text", "text": f"\n#### {seen}"},
        ]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "answer": str(seen)}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return extract_answer(completion) == conversation["answer"]


class Spelling(_OnWords):
    """A word, letter by letter."""

    name, kind, baseline = "spelling", "generative", 0.0

    def __getitem__(self, i: int) -> dict:
        rng, word = self._draw(i)
        messages = [
            {"role": "user", "content": _ask(rng, SPELL, w=word)},
            {"role": "assistant", "content": f"{word}: {','.join(word)}"},
        ]
        return {"messages": messages, "answer": ",".join(word)}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.rpartition(":")[2].strip() == conversation["answer"]


def embedded_words() -> list[str]:
    """A few thousand words that stand in the interpreter's help topics."""
    from pydoc_data.topics import topics

    return sorted({w for text in topics.values() for w in re.findall(r"\b[a-z]{3,10}\b", text)})


def read_words(path: Path) -> list[str]:
    """The words of a list, one a line, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [w for w in raw.decode().split() if w.isalpha() and w.isascii()]

"""Spelling: what tokens hide from a model. Spell a word, and count a letter in it (SpellingBee).

The answer to a count spells the word, counts along it, and then asks the calculator, so that the model learns both
ways and to trust the second. Letters stand apart by spaces: our vocabularies have every " r" as one token, while they
merge letters with commas and hyphens as text happens to ("s,", "-t"), so that a word would be spelled in many ways.

Words of the test split are never among those of training. `spelling.yaml` holds the wordings of the questions.
"""

import gzip
import random
import string
from collections.abc import Sequence
from pathlib import Path

from evals.tasks.base import Generated, dialogue, read_yaml
from evals.tasks.gsm8k import NumberAnswer, parse_parts
from nanochat_jax.data.split import HELD_OUT, held_out
from nanochat_jax.errors import UserError

QUOTES = ("", "", "'", '"', "`")


class _OnWords(Generated):
    sizes = {"train": 100_000, "test": 256}
    split_by_text = False  # but by the word

    def __init__(self, words: Sequence[str], split: str, size: int | None = None):
        super().__init__(split, size)
        self._words = sorted({w for w in words if held_out(w, HELD_OUT) == (split == "test")})
        if not self._words:
            raise UserError(f"task {self.name} has no words for its {split} split; give it a longer list of words")


def _ask(rng: random.Random, kind: str, word: str, letter: str = "") -> str:
    """One of the wordings, as people type them: with or without quotes, capitals and the mark at the end."""
    questions, requests = read_yaml("spelling.yaml")[kind].values()
    which = rng.randrange(len(questions) + len(requests))
    is_question = which < len(questions)
    template = (questions + requests)[which]
    if rng.random() < 0.3:
        template = template.lower()
    quote, before = rng.choice(QUOTES), rng.choice(("", "", "the word "))
    text = template.format(w=f"{before}{quote}{word}{quote}", l=f"{quote}{letter}{quote}")
    return text + (rng.choice(("?", "?", "?", "")) if is_question else rng.choice((".", "")))


class SpellingBee(NumberAnswer, _OnWords):
    """How many times a letter occurs in a word."""

    name, kind = "spellingbee", "generative"

    def make(self, rng: random.Random) -> dict:
        word = rng.choice(self._words)
        # Mostly a letter of the word; sometimes any, so that the answer may be 0.
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
        question = _ask(rng, "count", word, letter)
        along = ", ".join(f"{c} {word[: place + 1].count(letter)}" for place, c in enumerate(word))
        n = str(word.count(letter))
        spelled = f"The letters of {word}: {' '.join(word)}\nCounting {letter}: {along}\n"
        counted = f"That makes {n}. The calculator says:<<'{word}'.count('{letter}')={n}>> {n}.\n#### {n}"
        return dialogue(question, parse_parts(spelled + counted)) | {"answer": n}


class Spelling(_OnWords):
    name, kind = "spelling", "generative"

    def make(self, rng: random.Random) -> dict:
        word = rng.choice(self._words)
        letters = " ".join(word)
        question = _ask(rng, "spell", word)
        return dialogue(question, f"The letters of {word}: {letters}") | {"answer": letters}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether what follows the last colon is the letters, apart."""
        return completion.rpartition(":")[2].split() == conversation["answer"].split()


def read_words(path: str | Path) -> list[str]:
    """The words of a list, one a line, gzipped or not, in lower case. UserError where it cannot be read."""
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        words = raw.decode().split()
    except (OSError, EOFError, ValueError) as e:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} cannot be read as a list of words ({e})") from None
    return [w.lower() for w in words if w.isalpha() and w.isascii()]

"""Spelling: what tokens hide from a model. Spell a word, and count a letter in it (SpellingBee).

The answer to a count spells the word, counts along it, and then asks the calculator, so that the model learns both
ways and to trust the second. Letters stand apart by spaces: our vocabularies have every " r" as one token, while they
merge letters with commas and hyphens as text happens to ("s,", "-t"), so that a word would be spelled in many ways.

Words of the test split are never among those of training.
"""

import gzip
import random
import string
from collections.abc import Sequence
from pathlib import Path

from evals.tasks.base import Generated, dialogue
from evals.tasks.gsm8k import NumberAnswer, parse_parts
from nanochat_jax.data.split import HELD_OUT, held_out
from nanochat_jax.errors import UserError

COUNT_QUESTIONS = (
    "How many {l} are in {w}",
    "How many {l} are there in {w}",
    "How many {l} does {w} have",
    "How many {l} can you find in {w}",
    "How many letters {l} do I need to write {w}",
    "How many of the letters of {w} are {l}",
    "How often do you see {l} in {w}",
    "How often is {l} used in {w}",
    "How often does the letter {l} turn up in {w}",
    "Can you count the letter {l} in {w}",
    "Could you check how many {l} {w} has",
    "Do you know how often {l} is in {w}",
    "What do you get when you count the letter {l} in {w}",
    "In {w} there are how many {l}",
    "If I write down {w}, how often do I write {l}",
    "Going through {w} letter by letter, how often do you meet {l}",
    "Quick question about {w}: how many {l}",
    "I am playing a word game, so how many {l} does {w} give me",
)
COUNT_REQUESTS = (
    "Count {l} in {w}",
    "Count the letter {l} in {w}",
    "Count every {l} that you find in {w}",
    "Please go through {w} and count the letter {l}",
    "Please tell me how many {l} {w} has",
    "Look at {w} and say how often you see {l}",
    "Find all {l} in {w} and say how many there are",
    "I need to know how often {l} is used in {w}",
    "Give me the count of {l} for {w}",
)
SPELL_QUESTIONS = (
    "How do you spell {w}",
    "How is {w} spelled",
    "How do I write {w}",
    "Can you spell {w}",
    "Could you spell {w} for me",
    "What are the letters of {w}",
    "Which letters make up {w}",
)
SPELL_REQUESTS = (
    "Spell {w}",
    "Please spell {w}",
    "Spell {w} letter by letter",
    "Spell out {w} for me",
    "Write {w} one letter at a time",
    "Give me the letters of {w} in order",
    "Take {w} apart into its letters",
)
QUOTES = ("", "", "'", '"', "`")


class _OnWords(Generated):
    """Questions about the words of a split."""

    sizes = {"train": 100_000, "test": 256}

    def __init__(self, words: Sequence[str], split: str, size: int | None = None):
        super().__init__(split, size)
        self._words = sorted({w for w in words if held_out(w, HELD_OUT) == (split == "test")})
        if not self._words:
            raise UserError(f"task {self.name} has no words for its {split} split; give it a longer list of words")

    def is_in_split(self, conversation: dict) -> bool:
        return True  # as its word is


def _ask(rng: random.Random, questions: Sequence[str], requests: Sequence[str], word: str, letter: str = "") -> str:
    """One of the wordings, as people type them: with or without quotes, capitals and the mark at the end."""
    which = rng.randrange(len(questions) + len(requests))
    is_question = which < len(questions)
    template = questions[which] if is_question else requests[which - len(questions)]
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
        question = _ask(rng, COUNT_QUESTIONS, COUNT_REQUESTS, word, letter)
        along = ", ".join(f"{c} {word[: place + 1].count(letter)}" for place, c in enumerate(word))
        n = str(word.count(letter))
        spelled = f"The letters of {word}: {' '.join(word)}\nCounting {letter}: {along}\n"
        counted = f"That makes {n}. The calculator says:<<'{word}'.count('{letter}')={n}>> {n}.\n#### {n}"
        return dialogue(question, parse_parts(spelled + counted)) | {"answer": n}


class Spelling(_OnWords):
    """A word, letter by letter."""

    name, kind = "spelling", "generative"

    def make(self, rng: random.Random) -> dict:
        word = rng.choice(self._words)
        letters = " ".join(word)
        question = _ask(rng, SPELL_QUESTIONS, SPELL_REQUESTS, word)
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

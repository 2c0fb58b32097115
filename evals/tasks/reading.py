"""Multiple choice about stated facts, and the exercises that lead a model of minutes to it.

Without the others `facts` was at chance after more than a million tokens: an answer needs the stated word found, its
line among the choices found by it, and the letter of that line copied, and none of the three pays without the other
two. Each exercise asks for one of them more: `repeat` for copying what followed, `lookup` for the partner of a word in
a list, `choices` for that in the form of a multiple-choice question, `reading` for the stated word itself. A model of
four layers of width 128 that has done the first two for a million tokens learns `facts` within half a million.
"""

import random
import string

from evals.tasks.arithmetic import NAMES
from evals.tasks.base import Generated, dialogue
from evals.tasks.multiple_choice import LETTERS, multiple_choice, render_multiple_choice

PARTNERS = string.ascii_uppercase[:8]
# (a fact, its question, the kind of value that it states)
FACTS = (
    ("{n} has a {v} {o}.", "Which colour is the {o} of {n}?", "colour"),
    ("{n} lives in {v} now.", "Where does {n} live?", "town"),
    ("{n} has a {v} at home.", "Which animal does {n} have?", "animal"),
    ("{n} is a {v} by trade.", "What does {n} do?", "job"),
    ("{n} likes {v} most.", "What does {n} like most?", "food"),
)
OBJECTS = ("hat", "car", "bag", "door", "coat", "bike", "cup", "house")
VALUES = {
    "colour": ("red", "blue", "green", "white", "black", "yellow", "brown", "orange"),
    "town": ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Cairo"),
    "animal": ("dog", "cat", "horse", "bird", "fish", "sheep", "goat", "rabbit"),
    "job": ("teacher", "doctor", "baker", "farmer", "driver", "painter", "lawyer", "pilot"),
    "food": ("bread", "cheese", "rice", "soup", "cake", "fruit", "pasta", "salad"),
}
WORDS = tuple(word for words in VALUES.values() for word in words)


def _stated(rng: random.Random) -> tuple[str, str, str]:
    """(a fact and its question, the value that answers it, the kind of that value)."""
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    fact, question, kind = rng.choice(FACTS)
    value = rng.choice(VALUES[kind])
    return f"{fact.format(n=name, o=thing, v=value)} {question.format(n=name, o=thing)}", value, kind


class Facts(Generated):
    """Multiple choice about what the question itself states: one fact, four choices, the wrong ones of other kinds."""

    name, kind, baseline = "facts", "categorical", 0.25

    def make(self, rng: random.Random) -> dict:
        stated, right, kind = _stated(rng)
        others = rng.sample([k for k in VALUES if k != kind], 3)
        choices = [right, *(rng.choice(VALUES[k]) for k in others)]
        rng.shuffle(choices)
        return multiple_choice(stated, LETTERS, choices, LETTERS[choices.index(right)])


# In the exercises a conversation has several questions, of which the last is scored; answers begin with a space.


class Repeat(Generated):
    """Words, letters and pairs of both, to be said again."""

    name, kind = "repeat", "generative"

    def __init__(self, split: str, words: list[str], size: int | None = None):
        super().__init__(split, size)
        self._words = words

    def make(self, rng: random.Random) -> dict:
        text = " ".join(self._item(rng) for _ in range(rng.randint(3, 8)))
        return dialogue(f"Repeat: {text}", f" {text}")

    def _item(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(self._words if kind < 0.3 else WORDS)
        letter = rng.choice(PARTNERS)
        return letter if kind < 0.6 else f"{rng.choice(WORDS)}={letter}"


class Lookup(Generated):
    """A list of words, each with a letter, and questions for the letter of a word or the word of a letter."""

    name, kind = "lookup", "generative"

    def make(self, rng: random.Random) -> dict:
        n = rng.randint(2, 6)
        pairs = list(zip(rng.sample(WORDS, n), rng.sample(PARTNERS, n)))
        listed = "".join(f"- {word}={letter}\n" for word, letter in pairs)
        turns: list[str] = []
        for word, letter in (rng.choice(pairs) for _ in range(7)):
            turns += (f"Which letter is {word}?", letter) if rng.random() < 0.8 else (f"What is {letter}?", f" {word}")
        return dialogue(f"{listed}\n{turns[0]}", *turns[1:])


class Choices(Generated):
    """Multiple choice whose question names the right choice, and more questions for letters."""

    name, kind = "choices", "generative"

    def make(self, rng: random.Random) -> dict:
        choices = rng.sample(WORDS, len(LETTERS))
        words = [rng.choice(choices) for _ in range(4)]
        wording = rng.choice(("Which letter is {}?", "Which of these is {}?", "Where is {}?"))
        asked = [render_multiple_choice(wording.format(words[0]), LETTERS, choices)]
        asked += [f"Which letter is {word}?" for word in words[1:]]
        return dialogue(*(turn for text, word in zip(asked, words) for turn in (text, LETTERS[choices.index(word)])))


class Reading(Generated):
    """Facts and questions about them, to be answered with the word that was stated."""

    name, kind = "reading", "generative"

    def make(self, rng: random.Random) -> dict:
        stated = [_stated(rng) for _ in range(4)]
        return dialogue(*(turn for text, value, _ in stated for turn in (text, f" {value}")))

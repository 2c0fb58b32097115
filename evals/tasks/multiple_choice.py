"""Multiple choice: how it is asked; ARC (Clark et al., arXiv 1803.05457); MMLU (Hendrycks et al., arXiv 2009.03300)."""

import random
import statistics
import string
from collections.abc import Sequence

from evals.tasks.base import FromRows, Generated, brief, dialogue
from nanochat_jax.data import stories

LETTERS = ("A", "B", "C", "D")
NESTED = "train"  # the hub's configuration auxiliary_train has its rows one level down, in a column of this name


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A question with its choices. The letter comes last in its line: there a small model finds it more easily."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> dict:
    """The conversation that asks a question with these choices; `answer` is the right letter. ValueError."""
    if len(choices) < 2 or len(choices) != len(letters) or not all(isinstance(c, str) for c in (*letters, *choices)):
        raise ValueError(f"it needs two or more texts, each with a letter, and has {brief(choices)}, {brief(letters)}")
    if answer not in letters:
        raise ValueError(f"the answer {brief(answer)} is none of its letters, {', '.join(letters)}")
    return dialogue(render_multiple_choice(question, letters, choices), answer) | {"letters": list(letters)}


class ARC(FromRows):
    """School science: `question`, three to five `choices` ({"text", "label"}), `answerKey`. Some labels are 1 to 4."""

    kind, baseline = "categorical", 0.25
    columns = {"question": str, "choices": dict, "answerKey": str}

    def __init__(self, rows: Sequence[dict], name: str):
        self.name = name
        super().__init__(rows)

    def conversation(self, row: dict) -> dict:
        labels, texts = (row["choices"].get(key) or () for key in ("label", "text"))
        return multiple_choice(row["question"], labels, texts, row["answerKey"])


class MMLU(FromRows):
    """57 subjects: `question`, `choices` (four texts), `answer` (0 to 3) and, in the test split, `subject`.

    Tables like it may have up to 26 choices, and letters for answers; chance is then one in so many.
    """

    name, kind, baseline = "mmlu", "categorical", 0.25
    columns = {"question": str, "choices": list, "answer": (int, str)}

    def unpacked(self, row: dict) -> dict:
        return row.get(NESTED) or row

    def chance(self, conversations: Sequence[dict]) -> float:
        return statistics.mean(1 / len(c["letters"]) for c in conversations)

    def conversation(self, row: dict) -> dict:
        letters, answer = tuple(string.ascii_uppercase[: len(row["choices"])]), row["answer"]
        if isinstance(answer, str):
            answer = answer.strip().upper()
        elif 0 <= answer < len(letters):
            answer = letters[answer]
        asked = multiple_choice(row["question"], letters, row["choices"], answer)
        return asked | ({"subject": row["subject"]} if row.get("subject") else {})


class Facts(Generated):
    """Questions about what the question itself states, for models that are trained without a network."""

    name, kind, baseline = "facts", "categorical", 0.25

    def make(self, rng: random.Random) -> dict:
        (told,) = stories.scenes(rng, 1)
        question, _, right = rng.choice(told.questions)
        wrong: set[str] = set()
        while len(wrong) < len(LETTERS) - 1:
            wrong |= {rng.choice(stories.scenes(rng, 1)[0].questions).wanted} - {right}
        choices = rng.sample([right, *sorted(wrong)], len(LETTERS))
        letter = LETTERS[choices.index(right)]
        return multiple_choice(f"{told.text} {question}", LETTERS, choices, letter)

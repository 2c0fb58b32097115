"""Word problems whose steps are written out before the answer: the same questions without thoughts, with them, and with
a budget of tokens for them.

A system message says which; its subject is `off`, `on`, or how many tokens at most. Thoughts say what the numbers are
and what is to be done with them; where there is little room, the latter alone.
"""

import ast
import random
import re

from evals.tasks.plain import Arithmetic
from nanochat_jax.chats import system_text
from nanochat_jax.engine.dialogue import Caller

WITHIN = 16  # tokens, in tests
LITTLE = 30  # tokens that are not enough for all that there is to say
WORDS = {ast.Add: "plus", ast.Sub: "minus", ast.Mult: "times", ast.Div: "divided by"}


class Thinking(Arithmetic):
    name = "thinking"
    sizes = {"train": 100_000, "test": 198}  # so few that all are asked, each in all three ways

    def __getitem__(self, i: int) -> dict:
        """In tests each question is asked in three ways."""
        if self.split == "train":
            rng = random.Random(f"thinking {i}")
            return self._with(super().__getitem__(i), rng.choice((True, True, rng.randint(8, 80))))
        return self._with(super().__getitem__(i // 3), (False, True, WITHIN)[i % 3])

    def caller(self, conversation: dict) -> Caller | None:
        budget = conversation["budget"]
        return Caller(budget=budget) if budget is not True and budget else None

    def _with(self, asked: dict, budget: bool | int) -> dict:
        """A question with its thoughts."""
        question, answer = asked["messages"]
        parts = answer["content"]
        system = [{"role": "system", "content": system_text([], budget)}] if budget else []
        if budget:
            expression = parts[0]["text"]
            plan = f"{_in_words(ast.parse(expression, mode='eval').body)}."
            *numbers, last = re.findall(r"[0-9.]+", expression)
            said = plan if budget is not True and budget < LITTLE else f"I know {', '.join(numbers)} and {last}. {plan}"
            parts = [{"type": "think", "text": said}, *parts]
        subject = ("on" if budget is True else f"within {budget} tokens") if budget else "off"
        messages = [*system, question, {"role": "assistant", "content": parts}]
        return {**asked, "messages": messages, "subject": subject, "budget": budget}


def _in_words(node: ast.AST) -> str:
    """What is to be worked out, in the order in which it is."""
    match node:
        case ast.BinOp(left, sign, right) if not isinstance(right, ast.BinOp):
            return (
                f"{_in_words(left)}{',' if isinstance(left, ast.BinOp) else ''} {WORDS[type(sign)]} {_in_words(right)}"
            )
        case ast.BinOp(left, sign, right):
            return f"{_in_words(left)} {WORDS[type(sign)]} all of {_in_words(right)}"
    return ast.unparse(node)

"""HumanEval: functions to be written from their docstrings, run against tests. Chen et al., arXiv 2107.03374."""

import re

from evals.sandbox import run_program
from evals.tasks.base import FromRows, dialogue

_FENCED = re.compile(r"```(?:python)?\s*?\n(?P<code>.*?)\n```", re.DOTALL)
SECONDS = 5.0  # that a program may take


def extract_program(completion: str) -> str:
    """The first fenced block of a completion, or all of it."""
    found = _FENCED.search(completion)
    return (found["code"] if found else completion).strip()


def import_lines(prompt: str) -> list[str]:
    """The imports above the first function of a prompt, which a completion may leave to the prompt."""
    head = re.split(r"^(?:def|class) ", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return [line for line in head.splitlines() if line.startswith(("import ", "from "))]


class HumanEval(FromRows):
    """Rows with `prompt`, `canonical_solution`, `test` and `entry_point`."""

    name, kind = "humaneval", "generative"
    columns = ("prompt", "canonical_solution", "test", "entry_point")

    def conversation(self, row: dict) -> dict:
        whole = (row["prompt"] + row["canonical_solution"]).strip()
        asked = dialogue(row["prompt"], f"```python\n{whole}\n```")
        return asked | {"test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return self.judge(conversation, completion)[0]

    def judge(self, conversation: dict, completion: str) -> tuple[bool, str]:
        """Whether the tests pass in the sandbox, and what happened. Helpers of a prompt must be in the completion."""
        imports = "\n".join(import_lines(conversation["messages"][0]["content"]))
        check = f"check({conversation['entry_point']})"
        source = "\n\n".join([imports, extract_program(completion), conversation["test"], check])
        result = run_program(source, timeout=SECONDS)
        return result.ok, str(result)

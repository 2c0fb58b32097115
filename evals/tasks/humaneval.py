"""HumanEval: functions to be written from their docstrings, run against tests. Chen et al., arXiv 2107.03374."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evals.sandbox import run_program
from evals.tasks.base import Task

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)```", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from) .*$", re.MULTILINE)
SECONDS = 5.0  # that a program may take


def extract_program(completion: str) -> str:
    """The first fenced block of a completion, or all of it."""
    found = _FENCED.search(completion)
    return (found[1] if found else completion).strip()


class HumanEval(Task):
    """Rows with `prompt`, `canonical_solution`, `test` and `entry_point`."""

    name, kind, baseline = "humaneval", "generative", 0.0

    def __init__(self, rows: Sequence[dict]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        row = self._rows[i]
        whole = row["prompt"] + row["canonical_solution"]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"```python\n{whole}\n```"},
        ]
        return {"messages": messages, "test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the tests pass; imports of the prompt, which a completion may rely on, come first."""
        imports = _IMPORT.findall(conversation["messages"][0]["content"])
        check = f"check({conversation['entry_point']})"
        source = "\n\n".join([*imports, extract_program(completion), conversation["test"], check])
        return run_program(source, timeout=SECONDS).ok

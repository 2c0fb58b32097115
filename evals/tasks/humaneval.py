"""HumanEval: functions to be written from their docstrings, run against tests. Chen et al., arXiv 2107.03374."""

import re
import textwrap

from evals.sandbox import run_program
from evals.tasks.base import FromRows, dialogue

_FENCED = re.compile(r"```(?:python)?\s*?\n(?P<code>.*?)\n```", re.DOTALL)
_BLOCK = re.compile(r"(?P<fence>`{3,}|~{3,})(?P<inside>.*?)(?:(?P=fence)|\Z)", re.DOTALL)
_PYTHON = re.compile(r"\W*(?:i?py(?:thon)?[\d.]*)?(?!\w)", re.IGNORECASE)  # what may begin the line of a fence
SECONDS = 5.0  # that a program may take


def extract_program(completion: str) -> str:
    """The first fenced block of a completion, or all of it."""
    found = _FENCED.search(completion)
    return (found["code"] if found else completion).strip()


def find_program(completion: str, name: str) -> str:
    """The first block that defines the function `name`, or all of a completion.

    Blocks of Python, or of no language, come first; last the text before the first fence.
    """
    blocks = [m["inside"] for m in _BLOCK.finditer(completion)]
    blocks.sort(key=lambda inside: not _PYTHON.match(inside))
    defines = re.compile(rf"(?:async +)?def +{re.escape(name)}\b|^[ \t]*{re.escape(name)} *=", re.MULTILINE)
    for inside in blocks:
        first, _, rest = inside.partition("\n")
        if begun := defines.search(first):  # in the line of the fence
            return inside[begun.start() :].strip()
        if defines.search(rest):
            return textwrap.dedent(rest).strip()
    before = re.split("```|~~~", completion, maxsplit=1)[0]
    return (before if defines.search(before) else completion).strip()


def import_lines(prompt: str) -> list[str]:
    """The imports above the first function of a prompt, which a completion may leave to the prompt."""
    head = re.split(r"^(?:def|class) ", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return [line for line in head.splitlines() if line.startswith(("import ", "from "))]


class HumanEval(FromRows):
    name, kind = "humaneval", "generative"
    lenient = (
        "programs in fenced blocks of any kind: ```py, ~~~, indented, without an end, after a block of another language"
    )
    columns = dict.fromkeys(("prompt", "canonical_solution", "test", "entry_point"), str)

    def conversation(self, row: dict) -> dict:
        whole = (row["prompt"] + row["canonical_solution"]).strip()
        asked = dialogue(row["prompt"], f"```python\n{whole}\n```")
        return asked | {"test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return self.judge(conversation, completion)[0]

    def judge(self, conversation: dict, completion: str) -> tuple[bool, str]:
        """Whether the tests pass in the sandbox, and what happened. Helpers of a prompt must be in the completion."""
        return self._run(conversation, extract_program(completion))

    def admits(self, conversation: dict, completion: str) -> bool:
        program = find_program(completion, conversation["entry_point"])
        return program != extract_program(completion) and self._run(conversation, program)[0]

    def _run(self, conversation: dict, program: str) -> tuple[bool, str]:
        imports = "\n".join(import_lines(conversation["messages"][0]["content"]))
        check = f"check({conversation['entry_point']})"
        source = "\n\n".join([imports, program, conversation["test"], check])
        result = run_program(source, timeout=SECONDS)
        return result.ok, str(result)

"""Plain questions as people type them, written by somebody who had not seen what the model is trained on.

A line of everyday.jsonl is {"kind", "half": dev or test, "turns": what the user says in turn, "check"}. Where there are
several turns, the model answers each of them, and the last answer is judged.
"""

import json
from pathlib import Path

from evals.tasks.base import dialogue
from evals.tasks.checks import Checked


class Everyday(Checked):
    """Both halves, or one of them."""

    name, kind = "everyday", "generative"

    def __init__(self, half: str | None = None):
        lines = (Path(__file__).parent / "everyday.jsonl").read_text(encoding="utf-8").splitlines()
        self._rows = [row for row in map(json.loads, lines) if half in (None, row["half"])]

    def __getitem__(self, i: int) -> dict:
        row = self._rows[i]
        first, *then = row["turns"]
        return dialogue(first) | {"then": then, "check": row["check"], "subject": row["kind"]}

"""ARC: grade-school science questions with three to five choices. Clark et al., arXiv 1803.05457."""

from __future__ import annotations

from collections.abc import Sequence

from evals.tasks.base import MultipleChoice


class ARC(MultipleChoice):
    """Rows with `question`, `choices` ({"text", "label"}) and `answerKey`."""

    def __init__(self, rows: Sequence[dict], name: str):
        super().__init__(name, rows)

    def read(self, row: dict) -> tuple[str, list[str], list[str], str]:
        return row["question"], list(row["choices"]["label"]), list(row["choices"]["text"]), row["answerKey"]

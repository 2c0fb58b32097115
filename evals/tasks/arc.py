"""ARC: grade-school science questions with three to five choices. Clark et al., arXiv 1803.05457."""

from __future__ import annotations

from collections.abc import Sequence

from evals.tasks.base import MultipleChoice, check_columns


class ARC(MultipleChoice):
    """Rows with `question`, `choices` ({"text", "label"}) and `answerKey`. Some label their choices 1 to 4."""

    def __init__(self, rows: Sequence[dict], name: str):
        check_columns(name, rows, ("question", "choices", "answerKey"))
        super().__init__(name, rows)

    def read(self, row: dict) -> tuple[str, list[str], list[str], str]:
        return row["question"], list(row["choices"]["label"]), list(row["choices"]["text"]), row["answerKey"]

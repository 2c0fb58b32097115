"""MMLU: questions of 57 subjects with four choices. Hendrycks et al., arXiv 2009.03300."""

from __future__ import annotations

from collections.abc import Sequence

from evals.tasks.base import MultipleChoice

LETTERS = ("A", "B", "C", "D")


class MMLU(MultipleChoice):
    """Rows with `question`, `choices` (four texts) and `answer` (0 to 3)."""

    def __init__(self, rows: Sequence[dict]):
        super().__init__("mmlu", rows)

    def read(self, row: dict) -> tuple[str, list[str], list[str], str]:
        # auxiliary_train has its rows one level down
        row = row.get("train") or row
        return row["question"], list(LETTERS), list(row["choices"]), LETTERS[row["answer"]]

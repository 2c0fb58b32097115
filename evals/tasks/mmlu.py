"""MMLU: questions of 57 subjects with four choices. Hendrycks et al., arXiv 2009.03300."""

from __future__ import annotations

from collections.abc import Sequence

from evals.tasks.base import MultipleChoice, check_columns

LETTERS = ("A", "B", "C", "D")
NESTED = "train"  # the hub's configuration auxiliary_train has its rows one level down, in a column of this name


class MMLU(MultipleChoice):
    """Rows with `question`, `choices` (four texts), `answer` (0 to 3) and, in the test split, `subject`."""

    def __init__(self, rows: Sequence[dict]):
        if len(rows) and NESTED not in rows[0]:
            check_columns("mmlu", rows, ("question", "choices", "answer"))
        super().__init__("mmlu", rows)

    def read(self, row: dict) -> tuple[str, list[str], list[str], str]:
        row = row.get(NESTED) or row
        return row["question"], list(LETTERS), list(row["choices"]), LETTERS[row["answer"]]

    def also(self, row: dict) -> dict:
        subject = (row.get(NESTED) or row).get("subject")
        return {"subject": subject} if subject else {}

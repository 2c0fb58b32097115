"""Conversations to learn from, with nothing to score: local JSON lines, or SmolTalk (arXiv 2502.02737)."""

import gzip
import json
from array import array
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from evals.tasks.base import Task, check_columns
from nanochat_jax.data.documents import Documents
from nanochat_jax.data.split import held_out
from nanochat_jax.errors import UserError

HELD_OUT = 50  # one conversation in so many is for testing


class Conversations(Task):
    """Rows with `messages`; those that are no dialogue of user and assistant in turn are left out: `skipped` many.

    A hash of the text decides the split, so that a conversation that occurs twice is in one only. Rows are read again
    when asked for; only their indices are kept.
    """

    kind = "conversation"

    def __init__(self, rows: Sequence[dict], split: str, name: str = "chat"):
        check_columns(name, rows, ("messages",))
        self.name, self.skipped = name, 0
        self._rows, self._indices = rows, array("q")
        for i, row in enumerate(rows):
            if not _is_dialogue(row["messages"]):
                self.skipped += 1
            elif held_out("\0".join(m["content"] for m in row["messages"]), HELD_OUT) == (split == "test"):
                self._indices.append(i)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict:
        return {"messages": self._rows[self._indices[i]]["messages"]}


class Texts(Task):
    """Documents of pretraining, so that later stages do not forget them: the first of the training split."""

    name, kind = "text", "conversation"
    most = 20_000

    def __init__(self, documents: Documents):
        self._texts = list(islice(documents.train(), self.most))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> dict:
        return {"text": self._texts[i]}


def _is_dialogue(messages) -> bool:
    """Turns of user and assistant with something in them, the assistant's last; a system message may come first."""
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        return False
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return len(turns) >= 2 and [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)


def _is_message(m) -> bool:
    return isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) and bool(m["content"].strip())


def read_chats(folder: str | Path) -> list[dict]:
    """The rows of folder/*.jsonl.gz: {"messages": [...]} a line, or in *.raw_lists.* the list alone. UserError."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl.gz")):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as f:
                rows += [_row(json.loads(line), path, number) for number, line in enumerate(f, 1) if line.strip()]
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{path} is damaged ({e}); fetch it again") from None
    return rows


def _row(value, path: Path, number: int) -> dict:
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, dict) and "messages" in value:
        return {"messages": value["messages"]}
    raise UserError(f'{path}, line {number}: a conversation is {{"messages": [...]}}, or a list of messages')

"""Conversations to learn from, with nothing to score: local JSON lines, or SmolTalk (arXiv 2502.02737)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from evals.tasks.base import Task
from nanochat_jax.errors import UserError

TEST_SHARE = 50  # every so manieth conversation is held out


class Conversations(Task):
    """Rows with `messages`; those that are no dialogue of user and assistant in turn are left out and counted."""

    kind = "conversation"

    def __init__(self, rows: Sequence[dict], split: str, name: str = "chat"):
        self.name = name
        usable = [row["messages"] for row in rows if _is_dialogue(row["messages"])]
        self.skipped = len(rows) - len(usable)
        self._messages = [m for i, m in enumerate(usable) if (i % TEST_SHARE == TEST_SHARE - 1) == (split == "test")]

    def __len__(self) -> int:
        return len(self._messages)

    def __getitem__(self, i: int) -> dict:
        return {"messages": self._messages[i]}


def _is_dialogue(messages) -> bool:
    """Turns of user and assistant with something in them, the assistant's last; a system message may come first."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [m["role"] for m in turns]
    return (
        len(turns) >= 2
        and roles == ["user", "assistant"] * (len(turns) // 2)
        and all(isinstance(m["content"], str) and m["content"].strip() for m in turns)
    )


def read_chats(folder: Path) -> list[dict]:
    """The rows of folder/*.jsonl.gz: {"messages": [...]} a line, or in *.raw_lists.* the list alone. UserError."""
    rows = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as f:
                for line in f:
                    value = json.loads(line)
                    rows.append({"messages": value} if isinstance(value, list) else value)
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{path} is damaged ({e}); fetch it again") from None
    return rows

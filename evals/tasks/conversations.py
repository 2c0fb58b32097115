"""Conversations to learn from, with nothing to score: local JSON lines, or SmolTalk (arXiv 2502.02737)."""

from __future__ import annotations

import gzip
import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from evals.tasks.base import Task, check_columns
from nanochat_jax.errors import UserError

TEST_SHARE = 50  # one conversation in so many is held out


class Conversations(Task):
    """Rows with `messages`; those that are no dialogue of user and assistant in turn are left out: `skipped` many.

    What is held out is chosen by a hash of the text: it does not depend on the other rows, and a conversation that
    occurs twice is on one side only. Rows are read again when asked for; of the unusable nothing is kept.
    """

    kind = "conversation"

    def __init__(self, rows: Sequence[dict], split: str, name: str = "chat"):
        check_columns(name, rows, ("messages",))
        self.name, self.skipped = name, 0
        self._rows, self._places = rows, array("q")
        for i, row in enumerate(rows):
            if not _is_dialogue(row["messages"]):
                self.skipped += 1
            elif _held_out(row["messages"]) == (split == "test"):
                self._places.append(i)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> dict:
        return {"messages": self._rows[self._places[i]]["messages"]}


def _is_dialogue(messages) -> bool:
    """Turns of user and assistant with something in them, the assistant's last; a system message may come first."""
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        return False
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return len(turns) >= 2 and [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)


def _is_message(m) -> bool:
    return isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) and bool(m["content"].strip())


def _held_out(messages: list[dict]) -> bool:
    digest = hashlib.sha256("\0".join(m["content"] for m in messages).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % TEST_SHARE == 0


def read_chats(folder: str | Path) -> list[dict]:
    """The rows of folder/*.jsonl.gz: {"messages": [...]} a line, or in *.raw_lists.* the list alone. UserError."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl.gz")):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as f:
                for number, line in enumerate(f, 1):
                    value = json.loads(line) if line.strip() else None
                    if value is not None:
                        rows.append(_row(value, path, number))
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{path} is damaged ({e}); fetch it again") from None
    return rows


def _row(value, path: Path, number: int) -> dict:
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, dict) and "messages" in value:
        return {"messages": value["messages"]}
    raise UserError(f'{path}, line {number}: a conversation is {{"messages": [...]}}, or a list of messages')

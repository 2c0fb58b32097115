"""Conversations to learn from, with nothing to score: local files, or SmolTalk (arXiv 2502.02737)."""

import hashlib
from array import array
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from evals.tasks.base import Task
from nanochat_jax.chats import KINDS, Tally, chat_files, conversation_of, text_of
from nanochat_jax.data.documents import Documents
from nanochat_jax.data.split import held_out
from nanochat_jax.errors import UserError
from nanochat_jax.formats import some

HELD_OUT = 50  # one conversation in so many is for testing


class Conversations(Task):
    """Rows of any form that `chats` reads; `tally` counts those that it takes, and none is given where rows are of our
    form and were counted. UserError where none can be used.

    A hash of the text decides the split, so that a conversation that occurs twice is in one only. Rows are read again
    when asked for; only their indices are kept.
    """

    kind = "conversation"

    def __init__(self, rows: Sequence[dict], split: str, tally: Tally | None = None, name: str = "chat"):
        self.name, self._rows, self._indices = name, rows, array("q")
        counted = Tally()
        for i, row in enumerate(rows):
            messages = counted.take("", f"row {i + 1}", row)
            if messages and held_out(_text(messages), HELD_OUT) == (split == "test"):
                self._indices.append(i)
        tally = tally or counted
        if not tally.taken:
            raise UserError(f"task {name} has no conversation that can be used: {tally.lost()}")
        self.notes = tuple(f"{name}: {line}" for line in tally.lines())

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict:
        return {"messages": conversation_of(self._rows[self._indices[i]])[0]}


class Texts(Task):
    """Documents of pretraining, so that later stages do not forget them: the first of the training split."""

    name, kind = "text", "conversation"
    most = 20_000

    def __init__(self, documents: Documents):
        self._rows, digest = list(islice(documents.train(), self.most)), hashlib.sha256()
        for text in self._rows:
            digest.update(text.encode("utf-8", "replace") + b"\0")
        self.key = [digest.hexdigest()]

    def __getitem__(self, i: int) -> dict:
        return {"text": self._rows[i]}


def _text(messages: list[dict]) -> str:
    return "\0".join(text_of(m["content"], "\0") for m in messages)


def local_chats(folder: Path, split: str) -> Conversations:
    """The conversations of the files in and below a folder. UserError where there are none."""
    files, others = chat_files(folder)
    if not files:
        raise UserError(f"task chat needs conversations in {folder}: {KINDS}")
    tally = Tally()
    task = Conversations([{"messages": m} for m in tally.read(files, folder)], split, tally=tally)
    task.files = files
    if others:
        task.notes += (f"chat: {some([p.name for p in others])} not read; it takes {KINDS}",)
    return task

"""What a folder of conversations holds, before anything is trained on it."""

import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanochat_jax.chats import KINDS, Tally, chat_files, is_chat_file
from nanochat_jax.errors import UserError
from nanochat_jax.formats import some
from nanochat_jax.processes import cores
from tokenizer.chat import render_batch

CHARS = 4  # a token's, about, where no tokenizer says it
BATCH = 128  # conversations that are tokenized at a time


def check(path: Path, tok, context: int) -> Iterator[str]:
    """Lines on the conversations of a file, or of a folder's files (those in its chat/ where it has that), which are
    read one by one: forms, what was repaired or left out, lengths, duplicates, and the share of targets.

    tok: a tokenizer to count in tokens, or None to count in characters. context: in tokens. UserError where nothing
    can be used.
    """
    if not path.exists():
        raise UserError(f"there is no file or folder {path}")
    root = path / "chat" if (path / "chat").is_dir() else path
    files, others = chat_files(root) if root.is_dir() else ([root] if is_chat_file(root.name) else [], [root])
    if not files:
        raise UserError(f"{root} is or holds no file of conversations: {KINDS}")
    if root.is_dir() and others:
        yield f"{some([p.name for p in others])} not read; conversations are {KINDS}"
    tally, hashes, sizes = Tally(), array("q"), array("q")  # of the latter three numbers a conversation
    conversations = tally.read(files, root if root.is_dir() else root.parent)
    while batch := list(itertools.islice(conversations, BATCH)):
        hashes.extend(hash(str(messages)) for messages in batch)
        for numbers in _in_tokens(tok, batch, context) if tok else map(_in_characters, batch):
            sizes.extend(numbers)
    if not tally.taken:
        raise UserError(f"no conversation of {root} can be used: {tally.lost()}")
    yield from tally.lines()
    lengths, targets, kept = np.array(sizes).reshape(-1, 3).T
    unit, most = ("tokens", context + 1) if tok else ("characters", context * CHARS)
    middle, high, longest = np.percentile(lengths, (50, 99, 100), method="lower")
    yield f"lengths: half have at most {middle:,} {unit}, 99 % at most {high:,}, the longest {longest:,}"
    long = f"{(lengths > most).sum():,} are longer than the context of {context:,} tokens"
    if tok:
        yield f"{long} and are cropped to it; {(kept == 0).sum():,} have no target within it and are dropped"
    else:
        yield f"{long}, about {most:,} characters, and will be cropped (--run-dir RUN counts in tokens)"
    yield f"duplicates: {len(hashes) - len(np.unique(hashes)):,} conversations occur before"
    yield f"targets: {100 * targets.sum() / lengths.sum():.1f} % of {lengths.sum():,} {unit}"


def _in_tokens(tok, batch: list[list[dict]], context: int) -> Iterator[tuple[int, int, int]]:
    """(tokens, targets, those within a row) of each conversation."""
    for ids, mask in render_batch(tok, [{"messages": messages} for messages in batch], cores()):
        yield len(ids), sum(mask[1:]), sum(mask[1 : context + 1])


def _in_characters(messages: list[dict]) -> tuple[int, int, int]:
    """(characters, those of the assistant, the same) of a conversation."""
    length = targets = 0
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            length += len(part["text"])
            targets += len(part["text"]) * (message["role"] == "assistant" and part["type"] != "python_output")
    return length, targets, targets

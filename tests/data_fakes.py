"""What the tests of packing share. It imports no jax, for the processes that pack import it too."""

import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.data.packing import pack_documents
from nanochat_jax.errors import UserError
from tokenizer import SPECIAL_TOKENS


class Bytes:
    """A tokenizer of 256 bytes and the special tokens. `shift` moves its ids up, for a vocabulary beyond 16 bits."""

    def __init__(self, shift=0):
        self.shift, self.vocab_size, self.hash = shift, shift + 256 + len(SPECIAL_TOKENS), f"{shift:016x}"
        for i, name in enumerate(SPECIAL_TOKENS):
            setattr(self, name[2:-2], shift + 256 + i)

    def encode(self, text):
        return [self.shift + byte for byte in text.encode()]


@dataclass(frozen=True)
class Texts:
    """Documents of a few texts a piece. Reading waits at text `hold` until the file `gate` is there, and fails with
    `error` at text `bad`; each text takes `pause` seconds."""

    texts: tuple[str, ...]
    per_piece: int = 7
    gate: Path | None = None
    hold: int = 0
    bad: int | None = None
    error: Exception | None = None
    pause: float = 0.0

    @property
    def key(self):
        return [len(self.texts)]

    def pieces(self, split):
        for start in range(0, len(self.texts), self.per_piece):
            yield Part(self, start)

    def train(self):
        return iter(self.texts)

    val = train


@dataclass(frozen=True)
class Part:
    of: Texts
    start: int

    def texts(self):
        for i, text in enumerate(self.of.texts[self.start : self.start + self.of.per_piece], self.start):
            while self.of.gate and i >= self.of.hold and not self.of.gate.exists():
                time.sleep(0.01)
            if i == self.of.bad:
                raise self.of.error
            time.sleep(self.of.pause)
            yield text


def random_texts(n, seed=0, longest=60):
    rng = random.Random(seed)
    return tuple(chr(97 + i % 26) * rng.randint(1, longest) for i in range(n))


def imported(received):
    """The modules of a process that knows documents of all kinds and the tokenizer."""
    import tokenizer.chat  # noqa: F401
    from nanochat_jax.data import embedded, registry  # noqa: F401

    yield sorted(sys.modules)


def shout(received, *words):
    print("what is printed is no message")
    for word in words:
        yield word.upper()
    for word in received:
        yield word.upper()


def exit_in_the_middle(received):
    yield "half"
    time.sleep(0.2)  # so that it is on its way
    os._exit(9)


def pack_with_small_files(received, limit, *args, **options):
    """What packing says where no file may grow beyond `limit` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        pack_documents(*args, split="train", buffer=10, workers=0)
    except UserError as e:
        yield str(e)

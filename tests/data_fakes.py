"""What the tests of packing share. It imports no jax, for the processes that pack import it too."""

import os
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.config import DataConfig, ModelConfig, RunConfig
from nanochat_jax.data.packing import pack_split
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

    def encode_batch(self, texts, num_threads=None):
        return [self.encode(text) for text in texts]


def pack_documents(documents, tok, seq_len, cache, *, buffer=1000, goal_rows=None, workers=None, log=print):
    """`pack_split` of the training documents."""
    data = DataConfig(pack_buffer=buffer, pack_workers=workers)
    config = RunConfig(model=ModelConfig(sequence_len=seq_len), data=data)
    return pack_split(config, documents, tok, cache, "train", rows=goal_rows, log=log)


@dataclass(frozen=True)
class Texts:
    """Documents of a few texts a file. Reading waits at text `hold` until the file `gate` is there, and fails with
    `error` at text `bad`; each text takes `pause` seconds. `act` is called in the process that reads them."""

    texts: tuple[str, ...]
    per_file: int = 7
    gate: Path | None = None
    hold: int = 0
    bad: int | None = None
    error: Exception | None = None
    pause: float = 0.0
    act: Callable[[], object] = int  # which does nothing

    @property
    def key(self):
        return [len(self.texts)]

    def files(self, split):
        self.act()
        return (self.file(start) for start in range(0, len(self.texts), self.per_file))

    def file(self, start):
        for i, text in enumerate(self.texts[start : start + self.per_file], start):
            while self.gate and i >= self.hold and not self.gate.exists():
                time.sleep(0.01)
            if i == self.bad:
                raise self.error
            time.sleep(self.pause)
            yield text

    def train(self):
        return iter(self.texts)

    val = train


def random_texts(n, seed=0, longest=60):
    rng = random.Random(seed)
    return tuple(chr(97 + i % 26) * rng.randint(1, longest) for i in range(n))


def tell_modules():
    """Raises the names of what a process has imported that knows documents of all kinds and the tokenizer."""
    import tokenizer.chat  # noqa: F401
    from nanochat_jax.data import embedded, registry  # noqa: F401

    raise UserError(" ".join(sys.modules))


def limit_files():
    """No file may grow beyond 400 bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))


def print_and_exit():
    print("what is printed is no message", flush=True)
    os._exit(9)

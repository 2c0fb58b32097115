"""Text to ids and back: a thin, exact wrapper around a SentencePiece BPE model.

Two promises hold for every model that `train.py` makes. `decode(encode(text)) == text` for every Unicode string, and
no text ever becomes a special token: those are control symbols, which SentencePiece never matches in its input.
"""

import codecs
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_bytes, atomic_write_json

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the tool
    "<|python_end|>",
    "<|output_start|>",  # and the tool answers
    "<|output_end|>",
)
MODEL_FILE = "tokenizer.model"
META_FILE = "meta.json"

SPACE_MARK = "\u2581"  # SentencePiece's own spelling of a space: in a text it would come back as a space
MAX_PIECE_CHARS = 16_384  # characters encoded at a time: on longer strings SentencePiece slows down
MAX_SERIAL_PIECES = 4  # stretches for which starting threads takes longer than encoding them
_SURROGATE = re.compile("[\ud800-\udfff]")


def _stretches(text: str) -> list[str]:
    """`text` in stretches of at most MAX_PIECE_CHARS characters, each cut before the last word that begins in it, or at
    MAX_PIECE_CHARS where none does. No piece of the vocabulary spans a word boundary."""
    out, start = [], 0
    while len(text) - start > MAX_PIECE_CHARS:
        cut = start + MAX_PIECE_CHARS
        while cut > start and not (text[cut] == " " and text[cut - 1] != " "):
            cut -= 1
        cut = cut if cut > start else start + MAX_PIECE_CHARS
        out.append(text[start:cut])
        start = cut
    return [*out, text[start:]]


class Tokenizer:
    """A trained vocabulary. Attributes `bos`, `user_start`, ... are the ids of the special tokens."""

    bos: int
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int
    python_end: int
    output_start: int
    output_end: int

    def __init__(self, model: bytes, meta: dict | None = None):
        """From the bytes of a SentencePiece model. Raises UserError if they are not one with our special tokens."""
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise UserError(f"not a SentencePiece model: {e}") from None
        self.model = model
        self.meta = meta or {}
        self.hash = hashlib.sha256(model).hexdigest()[:16]
        self.vocab_size = self._sp.vocab_size()
        for name in SPECIAL_TOKENS:
            id = self._sp.piece_to_id(name)
            if not self._sp.is_control(id):
                raise UserError(f"this SentencePiece model has no control symbol {name}: python -m tokenizer train")
            setattr(self, name[2:-2], id)
        self._bytes = [self._bytes_of(id) for id in range(self.vocab_size)]
        self._space_mark_ids = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        if not all(map(self._sp.is_byte, self._space_mark_ids)):
            raise UserError("this SentencePiece model has no byte pieces (byte_fallback), so it would lose text")

    def _bytes_of(self, id: int) -> bytes:
        """What an id stands for: UTF-8, one raw byte, or nothing for control symbols, <unk> and unused ids."""
        sp = self._sp
        if sp.is_control(id) or sp.is_unknown(id) or sp.is_unused(id):
            return b""
        piece = sp.id_to_piece(id)
        if sp.is_byte(id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def save(self, dir: str | Path) -> None:
        """Writes tokenizer.model and meta.json; a reader sees the old files or the new ones, never half a file."""
        meta = {**self.meta, "vocab_size": self.vocab_size, "hash": self.hash}
        atomic_write_json(Path(dir) / META_FILE, meta)
        atomic_write_bytes(Path(dir) / MODEL_FILE, self.model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token. Raises UserError for a lone surrogate, which is not Unicode text."""
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, over all cores unless told otherwise."""
        parts = [[_stretches(part) for part in text.split(SPACE_MARK)] for text in texts]
        flat = [stretch for of_text in parts for of_part in of_text for stretch in of_part]
        try:
            if len(flat) <= MAX_SERIAL_PIECES:
                encoded = iter([self._sp.encode(stretch) for stretch in flat])
            else:
                encoded = iter(self._sp.encode(flat, num_threads=num_threads or os.cpu_count() or 1))
        except (UnicodeEncodeError, TypeError, RuntimeError) as e:  # which one depends on SentencePiece's version
            raise self._input_error(texts, e) from None
        out = []
        for of_text in parts:
            ids: list[int] = []
            for i, of_part in enumerate(of_text):
                ids += self._space_mark_ids if i else []
                ids += itertools.chain.from_iterable(itertools.islice(encoded, len(of_part)))
            out.append(ids)
        return out

    @staticmethod
    def _input_error(texts: Sequence[str], error: Exception) -> Exception:
        for text in texts:
            if found := _SURROGATE.search(text):
                return UserError(
                    f"the text is not valid Unicode: a lone surrogate U+{ord(found[0]):04X} at character "
                    f"{found.start()}; read it as UTF-8 with errors='replace'"
                )
        return error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; special tokens stand for none. Raises UserError for an id out of range."""
        out = []
        for id in ids:
            if not 0 <= id < self.vocab_size:
                outside = f"token id {id} is outside of this vocabulary of {self.vocab_size}"
                raise UserError(f"{outside}; is this the model's tokenizer?")
            out.append(self._bytes[id])
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8, which only a model can produce, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: bytes of text that each id stands for, 0 for special tokens. For bits per byte."""
        return np.array([len(b) for b in self._bytes], dtype=np.int32)


class StreamDecoder:
    """Text of ids as they come. Never shows part of a character: its bytes wait until the last of them is there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that is complete now, often empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes((id,)))

    def flush(self) -> str:
        """What is left at the end: empty, or U+FFFD for a character that never came whole."""
        return self._utf8.decode(b"", final=True)

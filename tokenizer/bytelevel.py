"""The vocabularies of others: byte-level BPE in a tokenizer.json, run by Hugging Face's `tokenizers`.

What `nanochat_jax.import` brings in beside foreign weights. It takes the place of our own in a run directory, with the
same promises: every text comes back, and no text becomes a special token. Not for training vocabularies.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text
from tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

JSON_FILE = "tokenizer.json"
GUARD = "\ufdd0"  # a noncharacter: no text that is exchanged holds it
# The chat template of an export guards every "|" that is said, so that no special token is read there. In transformers
# this takes the guards away again; here, where text never becomes a special token, it is not needed.
NORMALIZER = {"type": "Replace", "pattern": {"String": GUARD + "|"}, "content": "|"}


def byte_characters() -> dict[int, str]:
    """byte -> the character that stands for it in byte-level BPE (GPT-2): itself where it is printed, else 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}


class ByteLevelTokenizer(Tokenizer):
    """From the text of a tokenizer.json. UserError where it is no byte-level BPE with our special tokens.

    `text` is what an export writes: that text, with NORMALIZER.
    """

    def __init__(self, text: str):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "this vocabulary is a tokenizer.json, which needs the package tokenizers: uv sync --extra hf"
            ) from None
        try:
            self._bpe = tokenizers.Tokenizer.from_str(text)
            described = json.loads(text)
            kinds = {part["type"] for part in _parts(described["decoder"])}
        except Exception as e:  # of tokenizers
            raise UserError(f"not a tokenizer.json: {' '.join(str(e).split())}") from None
        if kinds != {"ByteLevel"}:
            raise UserError(
                f"this tokenizer.json is not byte-level BPE, but decodes by {' and '.join(sorted(kinds))}; if it was "
                "made of a tokenizer.model, take that (--tokenizer FOLDER)"
            )
        if described["normalizer"] not in (None, NORMALIZER):
            raise UserError("it changes text before it encodes it (normalizer), so that not every text would come back")
        if described["normalizer"] is None:
            text = json.dumps(described | {"normalizer": NORMALIZER}, ensure_ascii=False, indent=1) + "\n"
        self._bpe.normalizer = None
        self._bpe.encode_special_tokens = True
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self.text, self.meta = text, {}
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.vocab_size = self._bpe.get_vocab_size()
        added = {id: token.content for id, token in self._bpe.get_added_tokens_decoder().items() if token.special}
        ids = {name: id for id, name in added.items()}
        for name in SPECIAL_TOKENS:
            if name not in ids:
                raise UserError(f"this vocabulary has no special token {name}, which conversations need")
            setattr(self, name[2:-2], ids[name])
        to_byte = {character: b for b, character in byte_characters().items()}
        pieces = ["" if i in added else self._bpe.id_to_token(i) or "" for i in range(self.vocab_size)]
        self._bytes = [bytes(to_byte[c] for c in piece) for piece in pieces]

    def save(self, dir: str | Path) -> None:
        atomic_write_text(Path(dir) / JSON_FILE, self.text)

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text; `tokenizers` decides on threads by itself."""
        try:
            return [found.ids for found in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as e:
            raise self._input_error(texts, e) from None


def _parts(described: dict | None) -> list[dict]:
    if not described:
        return [{"type": "none"}]
    return described["decoders"] if described["type"] == "Sequence" else [described]

"""The tokenizer: SentencePiece BPE, lossless on every Unicode string, and the rendering of conversations.

`python -m tokenizer train --data PATH --out DIR` trains one; `python -m tokenizer evaluate --dir DIR --data PATH`
measures one. PATH is a .parquet or .txt file, or a folder of them.
"""

from pathlib import Path

from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from tokenizer.bytelevel import JSON_FILE, ByteLevelTokenizer
from tokenizer.tokenizer import META_FILE, MODEL_FILE, SPECIAL_TOKENS, StreamDecoder, Tokenizer

__all__ = ["SPECIAL_TOKENS", "StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The vocabulary that `Tokenizer.save` or an import wrote into a folder. UserError if there is none."""
    own, foreign = Path(folder) / MODEL_FILE, Path(folder) / JSON_FILE
    if own.is_file():
        return Tokenizer(own.read_bytes(), read_json(own.with_name(META_FILE)))
    if foreign.is_file():
        return ByteLevelTokenizer(foreign.read_text(encoding="utf-8"))
    raise UserError(f"no tokenizer in {folder} (no {MODEL_FILE}); train one: python -m tokenizer train --out {folder}")

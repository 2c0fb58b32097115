"""Bytes per token of a vocabulary, and beside it those of gpt2 and cl100k where their files are at hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizer.tokenizer import Tokenizer

# name -> the addresses whose SHA-1 names the file in tiktoken's cache
_TIKTOKEN_FILES = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "cl100k_base": ("encodings/cl100k_base.tiktoken",),
}
_TIKTOKEN_HOST = "https://openaipublic.blob.core.windows.net/"


def evaluate(tok: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """{"ours": bytes per token, "gpt2" and "cl100k_base" where they are at hand}. Never asks the network."""
    n_bytes = sum(len(text.encode()) for text in texts)
    out = {"ours": n_bytes / max(1, sum(map(len, tok.encode_batch(texts))))}
    for name in _TIKTOKEN_FILES:
        if _at_hand(name):
            import tiktoken

            encoding = tiktoken.get_encoding(name)
            tokens = sum(map(len, encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)))
            out[name] = n_bytes / max(1, tokens)
    return out


def _at_hand(name: str) -> bool:
    """tiktoken is installed, and its cache (TIKTOKEN_CACHE_DIR) holds the vocabulary."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return False
    names = [hashlib.sha1((_TIKTOKEN_HOST + path).encode()).hexdigest() for path in _TIKTOKEN_FILES[name]]
    return bool(folder) and all((Path(folder) / n).is_file() for n in names)

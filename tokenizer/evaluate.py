"""Bytes per token of a vocabulary, and beside it those of gpt2 and cl100k where their files are at hand."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizer.tokenizer import Tokenizer

_HOST = "https://openaipublic.blob.core.windows.net/"
# name -> {address: SHA-256 of the file}. tiktoken's cache names a file by the SHA-1 of its address.
_TIKTOKEN_FILES = {
    "gpt2": {
        "gpt-2/encodings/main/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "gpt-2/encodings/main/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "cl100k_base": {
        "encodings/cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    },
}


def evaluate(tok: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """{"ours": bytes per token, "gpt2" and "cl100k_base" where they are at hand}. Never asks the network.

    Bytes are those of UTF-8. The others are at hand where tiktoken is installed and its TIKTOKEN_CACHE_DIR holds them.
    """
    n_bytes = sum(len(text.encode()) for text in texts)
    out = {"ours": n_bytes / max(1, sum(map(len, tok.encode_batch(texts))))}
    for name in filter(_at_hand, _TIKTOKEN_FILES):
        import tiktoken

        encoding = tiktoken.get_encoding(name)
        tokens = encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        out[name] = n_bytes / max(1, sum(map(len, tokens)))
    return out


def _at_hand(name: str) -> bool:
    """Whether tiktoken can load a vocabulary without the network: a file that is absent or damaged it would fetch."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or importlib.util.find_spec("tiktoken") is None:
        return False
    paths = {
        Path(folder) / hashlib.sha1((_HOST + address).encode()).hexdigest(): digest
        for address, digest in _TIKTOKEN_FILES[name].items()
    }
    try:
        return all(hashlib.sha256(path.read_bytes()).hexdigest() == digest for path, digest in paths.items())
    except OSError:
        return False


def table(results: dict[str, float]) -> str:
    """What `evaluate` returns, a line a vocabulary, and how many more bytes a token of ours covers."""
    lines = [f"{'vocabulary':<12} {'bytes/token':>11} {'ours is':>9}"]
    for name, value in results.items():
        ahead = f"{results['ours'] / value - 1:+.1%}" if name != "ours" and value else ""
        lines.append(f"{name:<12} {value:>11.3f} {ahead:>9}".rstrip())
    return "\n".join(lines)

"""Train the vocabulary: a sample of the documents, SentencePiece BPE, two files.

python -m tokenizer train --data shared/data/pretrain --out runs/tok --vocab-size 32768
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from nanochat_jax.config import TokenizerConfig
from nanochat_jax.errors import UserError
from tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

LOSSLESS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "control_symbols": list(SPECIAL_TOKENS),
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    "max_sentence_length": 1 << 20,
}
SPLITTING = {
    "split_digits": True,
    "split_by_unicode_script": False,
}


def train_tokenizer(documents: Iterable[str], out_dir: str | Path, cfg: TokenizerConfig, log=print) -> dict:
    start = time.perf_counter()
    total = 0

    def sample():
        nonlocal total
        for d in documents:
            if total >= cfg.sample_chars:
                return
            d = d[: cfg.max_doc_chars]
            total += len(d)
            yield d

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample(),
            model_writer=out,
            vocab_size=cfg.vocab_size,
            minloglevel=2,
            **LOSSLESS,
            **SPLITTING,
        )
    except RuntimeError as e:
        raise UserError(f"cannot train a vocabulary of {cfg.vocab_size}: {e}") from None
    stats = {"seconds": time.perf_counter() - start, "chars": total}
    Tokenizer(out.getvalue(), {"stats": stats}).save(out_dir)
    log(f"tokenizer: {stats}")
    return stats

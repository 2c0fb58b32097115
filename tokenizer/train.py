"""Train the vocabulary: an even sample of the documents, SentencePiece BPE, two files.

Some settings put more bytes into a token than ours (nanochat_jax/bench/LOG.md). They are left because a prompt may end
in a line break or a space, from where a model that has only seen longer tokens does not know how to go on, and because
arithmetic wants a number to be its digits.
"""

import heapq
import io
import itertools
import random
import re
import string
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from nanochat_jax.config import TokenizerConfig
from nanochat_jax.errors import UserError
from nanochat_jax.processes import peak_memory_gb
from tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

# What makes `decode(encode(text)) == text` hold: nothing is normalised, and what is not a piece is spelled in bytes.
LOSSLESS: dict[str, Any] = {
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
}
CUT = "\ue000"  # a private character: stands in the training text where no piece may lie across
SPLITTING: dict[str, Any] = {
    "split_digits": True,
    "split_by_unicode_script": False,
    "max_sentencepiece_length": 32,
    "pretokenization_delimiter": CUT,
    # Printable ASCII are pieces even where the sample lacks them. The letters of multiple choice must be.
    "required_chars": "".join(map(chr, range(0x21, 0x7F))) + "\n",
}
# A piece ends with the line break that it holds, so that a text cut at a line break is cut between tokens. Nor does a
# letter join a line break after it, or an equals sign between letters: the choices of a question are "- red=A\n", where
# the "A" must be the token that the answer "A" is, and " red" the one that it is in a text.
_BEFORE_CUT = re.compile(r"[\r\n]+|=(?=[^\W\d_])")
# The share of the sample's characters that are pieces of their own, and what is tried where those are too many for
# the vocabulary. The rest is spelled in bytes.
COVERAGES = (0.9999, 0.9995, 0.999, 0.99, 0.98)  # SentencePiece takes no less
# Words are spelled letter by letter, " i q", and each is to be one token. Text alone never joins " " and "q", as "qu"
# is joined first. So the letters are added to the sample, often enough to be pieces in vocabularies of 1024 and more;
# in those of 4096 and more it changes bytes per token by less than 0.01 %.
LETTERS = "".join(f" {letter}" for letter in string.ascii_letters)
LETTERS_RARITY = 4  # added chars / (4 * vocab_size) times
LOOK_AHEAD = 20  # times sample_chars: the characters that the sample is drawn from, as reading more takes too long


def sample_documents(documents: Iterable[str], chars: int, max_doc_chars: int) -> list[str]:
    """An even sample of the documents, in their order: at most `chars` characters in all, max_doc_chars of any one.

    Every document draws a number from a fixed seed, and those with the lowest stay, so one pass is enough and only the
    sample is held in memory.
    """
    rng = random.Random(0)
    kept: list[tuple[float, int, str]] = []  # a heap, by the negated draw: the first is the next to go
    held = seen = 0
    for i, text in enumerate(documents):
        text = text[: min(chars, max_doc_chars)]
        heapq.heappush(kept, (-rng.random(), i, text))
        held += len(text)
        seen += len(text)
        while held > chars:
            held -= len(heapq.heappop(kept)[2])
        if seen >= LOOK_AHEAD * chars:
            break
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]


def with_cuts(text: str) -> str:
    """The text with CUT wherever a piece must begin or end."""

    def cut(found: re.Match) -> str:
        before = text[found.start() - 1 : found.start()]
        return (CUT if before.isalpha() else "") + found[0] + CUT

    return _BEFORE_CUT.sub(cut, text)


def _sentences(sample: list[str], vocab_size: int) -> Iterator[str]:
    """The sample as the trainer takes it. It would skip a text with U+2585 or NUL, and UTF-8 has no surrogates."""
    yield from itertools.repeat(LETTERS, sum(map(len, sample)) // (LETTERS_RARITY * vocab_size))
    for text in sample:
        text = text.encode("utf-8", errors="replace").decode()
        for character in ("\x00", "\u2585", CUT):
            if character in text:
                text = text.replace(character, " ")
        yield with_cuts(text)


def _fit(sample: list[str], vocab_size: int, apart: bool) -> bytes:
    """The bytes of a SentencePiece model. Raises UserError where the sample does not allow this vocab_size."""
    longest = max(len(LETTERS), *map(len, sample))
    for coverage in COVERAGES:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(sample, vocab_size),
                model_writer=model,
                vocab_size=vocab_size,
                character_coverage=coverage,
                max_sentence_length=min(8 * longest, 2**31 - 1),  # in bytes, CUTs too; it skips longer ones
                minloglevel=2,
                **LOSSLESS,
                **SPLITTING | {"split_by_unicode_script": apart},
            )
            return model.getvalue()
        except RuntimeError as e:
            error = e
            if "required_chars" not in str(e):
                break
    raise _size_error(error, vocab_size)


def _size_error(error: RuntimeError, vocab_size: int) -> UserError:
    message = str(error)
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return UserError(
            f"the training text is too small for a vocabulary of {vocab_size}: "
            f"set tokenizer.vocab_size (--vocab-size) to {found[1]} or less, or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"bytes, special tokens and the characters of the text do not fit a vocabulary of {vocab_size}: "
            f"set tokenizer.vocab_size (--vocab-size) to {max(512, int(found[1]) * 5 // 4)} or more"
        )
    return UserError(f"cannot train a vocabulary of {vocab_size}: {' '.join(message.split())}")


def train_tokenizer(documents: Iterable[str], out_dir: str | Path, cfg: TokenizerConfig, log=print) -> dict:
    """Train on a sample of the documents and save into out_dir; the same documents make the same vocabulary.

    Returns, and keeps in meta.json, {"documents": of the sample, "chars": of the sample, "seconds": in all,
    "peak_memory_gb": of this process}. Raises UserError where there are no documents or vocab_size is impossible.
    """
    start, long = time.perf_counter(), 0

    def counted():
        nonlocal long
        for text in documents:
            long += len(text) > cfg.max_doc_chars
            yield text

    sample = sample_documents(counted(), cfg.sample_chars, cfg.max_doc_chars)
    if not any(sample):
        raise UserError("no documents to train a tokenizer on; check data.dir, or --data")
    model = _fit(sample, cfg.vocab_size, cfg.apart)
    stats = {
        "documents": len(sample),
        "chars": sum(map(len, sample)),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }
    Tokenizer(model, {"stats": stats}).save(out_dir)
    log(
        f"tokenizer: {cfg.vocab_size} entries from {stats['chars'] / 1e6:.1f} M characters of {len(sample)} documents "
        f"in {stats['seconds']:.1f} s, peak memory {stats['peak_memory_gb']:.2f} GB"
        + (f"; of {long:,} longer documents the first {cfg.max_doc_chars:,} characters alone" if long else "")
    )
    return stats

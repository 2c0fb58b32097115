"""Our vocabulary as the tokenizer.json of Hugging Face's `tokenizers`: the same ids for every text.

Pieces are written with plain spaces; SentencePiece's mark for them, U+2581, is spelled in bytes, as by `Tokenizer`.

SentencePiece merges the pair whose piece has the best score, the leftmost of equals; `tokenizers` the pair that comes
first in a list. So the list has every pair that makes a piece, by the piece's score. The order of pairs that make the
same piece would matter only where two of them overlap, as in [ar][a][ra] for "ara"; merging from the left never comes
to that: not in 9,383 random vocabularies over one to three letters.

Special tokens are matched in any text here (`split_special_tokens=True` turns it off). The chat template keeps them out
of what people say: it puts a guard before every "|", which the normalizer removes once special tokens are matched. Its
ids are those of `tokenizer.chat`, its mask of the assistant's tokens is the loss mask, except where two text parts
follow each other: it joins them before they are encoded.
"""

import json
import re
from pathlib import Path

import sentencepiece

from nanochat_jax.errors import UserError
from tokenizer.bytelevel import NORMALIZER, byte_characters
from tokenizer.tokenizer import MAX_PIECE_CHARS, SPACE_MARK, SPECIAL_TOKENS, Tokenizer

TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def tokenizer_json(tok: Tokenizer) -> str:
    """The text of a tokenizer.json. UserError for a vocabulary that joins words or lacks the characters of its pieces,
    which those of `tokenizer.train` never do."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=tok.model)
    ids = range(sp.vocab_size())
    scores = {
        sp.id_to_piece(i).replace(SPACE_MARK, " "): sp.get_score(i)
        for i in ids
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) or sp.is_byte(i))
    }
    for piece in scores:
        if re.search("[^ ] ", piece) or not all(character in scores for character in piece):
            raise UserError(f"the vocabulary's piece {piece!r} has no equal in tokenizer.json")
    return _written(
        special={name: getattr(tok, name[2:-2]) for name in SPECIAL_TOKENS},
        cuts=[_split(WORD), _split(f"[\\s\\S]{{1,{MAX_PIECE_CHARS}}}")],
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        byte_fallback=True,
        vocab={sp.id_to_piece(i).replace(SPACE_MARK, " "): i for i in ids},
        merges=_merges(scores),
    )


def from_tiktoken(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> str:
    """The text of a tokenizer.json with the ids of a tiktoken encoding, which joins pairs by the rank of what they make
    and takes a word that is a token as it is."""
    characters = byte_characters()
    vocab = {"".join(characters[b] for b in token): rank for token, rank in ranks.items()}
    plain = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _written(
        special=special,
        cuts=[_split(pattern), {"type": "ByteLevel", **plain}],
        decoder={"type": "ByteLevel", **plain},
        ignore_merges=True,
        vocab=vocab | special,
        merges=_merges({token: -rank for token, rank in vocab.items()}),
    )


def _written(special: dict[str, int], cuts: list[dict], decoder: dict, **model) -> str:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **plain, "special": True} for name, id in special.items()],
        "normalizer": NORMALIZER,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, **model},
    }
    return json.dumps(described, ensure_ascii=False, indent=1) + "\n"


# A word with the spaces before it, the spaces at the end of a text, and U+2581: where `Tokenizer` cuts. No piece lies
# across such a place, and words that are encoded apart are looked up in a cache.
WORD = f" *[^ {SPACE_MARK}]+| +|{SPACE_MARK}"


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which they are joined."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]

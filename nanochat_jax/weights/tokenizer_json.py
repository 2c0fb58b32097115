"""Our vocabulary as the tokenizer.json of Hugging Face's `tokenizers`: the same ids for every text.

Pieces are written with plain spaces. SentencePiece's mark for them, U+2581, then is a character like any other that is
no piece, and is spelled in bytes, as `Tokenizer` does.

SentencePiece joins the pair whose piece has the best score, the leftmost where several make the same piece;
`tokenizers` joins the pair that comes first in a list. The list has every pair that makes a piece, by the piece's
score. In which order the pairs of one piece stand matters only where two of them overlap, as in [ar][a][ra] for "ara":
see `_splits`.

The special tokens are matched in any text here, as is usual there (`split_special_tokens=True` turns it off). The chat
template keeps them out of what people say: it puts a guard before every "|", and the normalizer takes it away again
where no special token is looked for any more.
"""

from __future__ import annotations

import graphlib
import json
import re
from pathlib import Path

import sentencepiece

from nanochat_jax.errors import UserError
from tokenizer.bytelevel import NORMALIZER, byte_characters
from tokenizer.tokenizer import SPACE_MARK, SPECIAL_TOKENS, STRETCH, Tokenizer

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
        special={name: tok.special(name) for name in SPECIAL_TOKENS},
        cuts=[_split(WORD), _split(f"[\\s\\S]{{1,{STRETCH}}}")],
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
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(id, name) for name, id in special.items()],
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


def _special(id: int, name: str) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": name, **plain, "special": True}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which they are joined."""
    merges, rank = [], {}
    for piece in sorted(scores, key=lambda p: -scores[p]):
        for pair in _splits(piece, scores, rank):
            rank[pair] = len(merges)
            merges.append(pair)
    return merges


def _splits(piece: str, scores: dict[str, float], rank: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The pairs that make `piece`; rank: the place of the pairs that are joined before any of them.

    Where x + y and y + z are both the piece and [x][y][z] can come up, (x, y) must stand before (y, z), as the leftmost
    is joined. It can come up where joining the text x + y + z by what is ranked so far leaves these three.
    """
    order = graphlib.TopologicalSorter()
    for cut in range(1, len(piece)):
        x, y = piece[:cut], piece[cut:]
        if x not in scores or y not in scores:
            continue
        order.add((x, y))
        z = piece[len(y) :]
        if piece.startswith(y) and z in scores and x != y and _joined(x + y + z, rank) == [x, y, z]:
            order.add((y, z), (x, y))
    try:
        return list(order.static_order())
    except graphlib.CycleError:
        raise UserError(f"the vocabulary's piece {piece!r} has no equal in tokenizer.json") from None


def _joined(text: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a short text by the pairs in `rank`."""
    parts = list(text)
    while True:
        best = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, len(rank)), default=None)
        if best not in rank:
            return parts
        at = next(i for i in range(len(parts)) if (parts[i], parts[i + 1]) == best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]

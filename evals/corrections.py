"""Wrong answers in the CORE bundle, and the right ones.

In its arc_challenge.jsonl the questions whose choices are labelled 1 to 4 in the original, and not A to D, were read
one off: the answer given is choice int(label), at most the last, counted from 0. The table was made from the original's
answer keys, question by question. arc_easy.jsonl comes out of the same conversion and may have such rows too; they are
not in the table. Prompts stay as they are, wrong answers in few-shot examples included: only the marking changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

# label -> (row of the file, from 0; the question's `digest`; which choice is right)
TABLE = {
    "arc_challenge": (
        (44, "1d575c5e9da0bb1e", 1),
        (135, "9835b25800686e5c", 1),
        (313, "c9dd91354e08d92e", 2),
        (385, "a677aee7c110c35a", 0),
        (427, "2b53fdd122c05a25", 1),
        (437, "ab3b74a835e58f15", 2),
        (444, "a783fb46c6b94030", 1),
        (453, "c5be9a823fd27c1a", 2),
        (546, "30ccea1b57560437", 0),
        (670, "cc38517ac957ad75", 2),
        (825, "225368b926503fec", 1),
        (845, "0cccc03f7980aa5f", 1),
        (857, "b629a65b143bed04", 2),
        (886, "c3d8ce1a22647f99", 0),
        (953, "84ded650264c6352", 0),
        (963, "63d297d494614fb2", 1),
        (975, "ef81b1e7f58609e7", 2),
        (1092, "3586f30f061179c3", 1),
        (1113, "6d4b7b1d44611585", 1),
        (1152, "710bc94bff063c9a", 2),
    ),
}


def digest(item: dict) -> str:
    """16 hex digits that tell a multiple-choice question and its choices apart."""
    text = json.dumps([item["query"], item["choices"]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def right_golds(label: str, examples: Sequence[dict]) -> dict[int, int]:
    """{index in `examples`: the right choice} of those that the table has; none where it was made for another file."""
    known = {key: gold for _, key, gold in TABLE.get(label, ())}
    if not known:
        return {}
    return {i: known[key] for i, item in enumerate(examples) if (key := digest(item)) in known}

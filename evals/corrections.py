"""Wrong answers in the CORE bundle, and the right ones.

In its arc_challenge.jsonl the questions whose choices are labelled 1 to 4 in the original, and not A to D, were read
one off: the answer given is choice int(label), at most the last, counted from 0. The table was made from the original's
answer keys, question by question. arc_easy.jsonl comes out of the same conversion and may have such rows too; they are
not in the table. Prompts stay as they are, wrong answers in few-shot examples included: only the marking changes.
"""

import hashlib
import json
from collections.abc import Sequence

# label -> {the right choice: digests of the questions}
TABLE = {
    "arc_challenge": {
        0: "a677aee7 30ccea1b c3d8ce1a 84ded650",
        1: "1d575c5e 9835b258 2b53fdd1 a783fb46 225368b9 0cccc03f 63d297d4 3586f30f 6d4b7b1d",
        2: "c9dd9135 ab3b74a8 c5be9a82 cc38517a b629a65b ef81b1e7 710bc94b",
    }
}


def digest(item: dict) -> str:
    """8 hex digits that tell a multiple-choice question and its choices apart."""
    text = json.dumps([item["query"], item["choices"]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def right_golds(label: str, examples: Sequence[dict]) -> dict[int, int]:
    """{index in `examples`: the right choice} of those that the table has; none where it was made for another file."""
    known = {key: choice for choice, keys in TABLE.get(label, {}).items() for key in keys.split()}
    return {i: known[key] for i, item in enumerate(examples if known else ()) if (key := digest(item)) in known}

"""Markdown's parts, numbers as people read them, and text from outside made harmless."""

import re
import unicodedata
from collections.abc import Sequence

DASH = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first `left` columns to the left and the others to the right."""
    lines = [head, [":--"] * left + ["--:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fold(title: str, body: str) -> str:
    """What is shown when its title is clicked."""
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def fence(text: str, language: str = "text") -> str:
    """A block of code that nothing in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def printable(text: str) -> str:
    """Without what moves cursors, reverses lines or cannot be seen."""
    shown = (c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" for c in text)  # Zs: other spaces
    return "".join(c if is_shown else "\N{REPLACEMENT CHARACTER}" for c, is_shown in zip(text, shown))


def plain(text: str) -> str:
    """Text from outside as one line of Markdown that says just this: no markup, no HTML, no new table cell."""
    line = " ".join(printable(text).split())
    return re.sub(r"[\\`*\[\]<>|&~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def cut(text: str, chars: int, lines: int) -> str:
    """The beginning of a text, ended between two words, and how much was left out."""
    text = printable(text)
    kept = "\n".join(text.split("\n")[:lines])[:chars]
    if len(kept) == len(text):
        return text
    if not text[len(kept)].isspace() and (between := re.search(r"\s(?=\S*$)", kept)) and between.start() > chars // 2:
        kept = kept[: between.start()]
    kept = kept.rstrip()
    return f"{kept} [... {len(text) - len(kept):,} more characters]"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def duration(seconds: float | None) -> str:
    """3723 -> 1 h 02 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_ = divmod(minutes, 60)
    return f"{hours} h {minutes_:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(n: float | None) -> str:
    """12345678 -> 12.3 M."""
    if n is None:
        return DASH
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def plus_minus(value: float, stderr: float | None, digits: int = 3) -> str:
    """With its standard error, where that says something: the formula gives 0 where all answers were right, or none."""
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr else "")

"""Text that stands on every machine with this project: stories that it makes, and its packages' documentation.

A document is a story (`stories.py`), some sentences with questions about them, a page of a spelling book, or a
docstring of a package that the project depends on. Nothing depends on the interpreter. What comes from one file of a
package is either all training or all validation text.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path

from nanochat_jax.config import fingerprint
from nanochat_jax.data import stories
from nanochat_jax.data.documents import Documents
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text, digest_of
from nanochat_jax.formats import texts_of

PACKAGES = ("optax",)
TOO_SHORT = 200  # characters of a docstring that says little
VALIDATION_SHARE = 24  # one file in so many, by the hash of its name; also of the texts that are made
MADE = 40_000  # texts: with the docstrings, some 12 MB
SKIPPED = {"test", "tests", "_vendor"}


@dataclass(frozen=True)
class EmbeddedDocuments(Documents):
    """Made when first asked for, in a few seconds, and kept as JSON lines in the cache: some megabytes."""

    cache_dir: Path

    @cached_property
    def key(self) -> list:
        """What the texts are made of and by, so that nobody has to collect them to know that they are the same."""
        rules = Path(__file__), Path(stories.__file__), stories.HERE / "stories.yaml", stories.HERE / "words.txt"
        return ["embedded", PACKAGES, digest_of(chain(rules, *map(_modules, PACKAGES)))]

    def files(self, split: str) -> Iterator[Iterator[str]]:
        folder = self.cache_dir / "embedded" / fingerprint(self.key)
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            try:
                for name, texts in zip(("train", "val"), collect(), strict=True):
                    atomic_write_text(folder / f"{name}.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
            except OSError as e:
                raise UserError(f"cannot write to {folder} ({e.strerror or e}); set data.cache_dir") from None
        yield texts_of(path, "text")


def collect() -> tuple[list[str], list[str]]:
    """(training texts, validation texts)."""
    train: dict[int, str] = {}  # by their hash: aliases share their docstrings
    val: dict[int, str] = {}
    for name, texts in chain(_documentation(), _made()):
        split = val if _hash(name) % VALIDATION_SHARE == 0 else train
        for text in texts:
            digest = _hash(text)
            if digest not in train and digest not in val:
                split[digest] = text
    return [train[digest] for digest in sorted(train)], [val[digest] for digest in sorted(val)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _made() -> Iterator[tuple[str, list[str]]]:
    """(name, documents) of texts that are made here."""
    makers = (*[_story] * 3, *[_scenes] * 5, _spelling_page, *[_said_again] * 2, *[_tool_page] * 3)
    for i in range(MADE):
        rng = random.Random(f"text {i}")
        yield f"made/{i}", [rng.choice(makers)(rng)]


HEADINGS = ("A story about a {kind} called {hero}", "The story of {hero} the {kind}", "{hero}, a {kind}")
MORE = (
    (" and a {friend_kind} called {friend}", " and {friend}"),
    (" with a {thing}", " and a {thing}"),
    (" in the {place}",),
)


def _story(rng: random.Random) -> str:
    """A story, mostly with a heading that says who and what it is about, or with a question at its end."""
    told, lines = stories.story(rng), []
    if rng.random() < 0.8:
        more = [rng.choice(options) for options in rng.sample(MORE, rng.randint(0, 2))]
        more = [m for m in more if m[m.rindex("{") + 1 : -1] in told.slots()]
        lines.append(told.cast.fill("".join((rng.choice(HEADINGS), *more))) + ".")
    asked = [_answered(rng.choice(told.questions))] if rng.random() < 0.2 else []
    return "\n".join([*lines, told.text, *asked])


def _scenes(rng: random.Random) -> str:
    """Sentences, and answers to questions about some of them."""
    told = stories.scenes(rng, rng.randint(2, 6))
    asked = rng.choices([asked for s in told for asked in s.questions], k=rng.randint(2, 6))
    return " ".join(s.text for s in told) + "".join(f"\n{_answered(a)}" for a in asked)


def _answered(asked: stories.Asked) -> str:
    return f"{asked.question.rstrip('?')}? {asked.answer}"


def _spelling_page(rng: random.Random) -> str:
    """Words, each with its letters."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        word = _word(rng)
        quoted = f" '{word}'" if rng.random() < 0.5 else ""
        lines.append(f"{rng.choice(('', 'The word ', 'I spell '))}{word}:{quoted} {' '.join(word)}")
    return "\n".join(lines)


def _said_again(rng: random.Random) -> str:
    """Words and numbers, said twice: what can be copied at all is learned here, from every token of the second time."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        if rng.random() < 0.5:
            said = " ".join(_word(rng) if rng.random() < 0.6 else str(_number(rng)) for _ in range(rng.randint(2, 6)))
            wordings = ("Say {}. {}.", "{}: {}", "I said {} and you said {}.", "'{}' '{}'")
            lines.append(rng.choice(wordings).format(said, said))
        else:
            a, b, sign = _number(rng), _number(rng), rng.choice("+-*/")
            sums = ("{a} and {b}: {a}{sign}{b}", "{a} {sign} {b} is {a}{sign}{b}", "{b}, {a}: {a}{sign}{b}")
            lines.append(rng.choice(sums).format(a=a, b=b, sign=sign))
    return "\n".join(lines)


def _tool_page(rng: random.Random) -> str:
    """Signatures, and what is asked, with the call that answers it or with none: here it is learned to look for a word
    among names, many times on a page."""
    known, lines, tools = stories.script(), list[str](), dict[str, str]()
    nouns = [_word(rng).lower() for _ in range(rng.randint(3, 6))]
    for noun in nouns[: rng.randint(1, len(nouns) - 1)]:
        name = rng.choice(("{}", "{}", "get_{}", "{}_of", "find_{}", "set_{}", "{}_now")).format(noun)
        key = rng.choice(("city", "name", "thing", "place", "item", "to"))
        tools[noun] = f"{name}({key}="
        lines.append(f"def {name}({key}: str): ...")
    for _ in range(rng.randint(5, 9)):
        noun = rng.choice(nouns) if rng.random() < 0.85 else _word(rng).lower()
        value = rng.choice((_word(rng), rng.choice(known["lists"]["town"]), stories.person(rng)[0]))
        asked = rng.choice(known["tool_asked"]).format(noun=noun, value=value)
        answer = f' {tools[noun]}"{value}")' if noun in tools else ": I have no tool for that."
        lines.append(f"{asked}? About {noun}{answer}")
    return "\n".join(lines)


def _word(rng: random.Random) -> str:
    """A word, some in capitals."""
    word = stories.any_word(rng)
    return rng.choice((word, word, word, word.capitalize(), word.upper()))


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3)))


@cache
def documented_words() -> list[str]:
    """Some thousand words that occur in the packages' documentation, and the common ones."""
    found = {w for _, texts in _documentation() for text in texts for w in re.findall(r"\b[a-z]{3,10}\b", text)}
    return sorted(found.union(*stories.words().values()))


def _documentation() -> Iterator[tuple[str, list[str]]]:
    """(name, docstrings) of every file of the packages."""
    for package in PACKAGES:
        for path in _modules(package):
            yield f"{package}/{path.relative_to(_root(package)).as_posix()}", docstrings(path.read_bytes())


def _modules(package: str) -> list[Path]:
    root = _root(package)
    return sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))


def _root(package: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).parent  # type: ignore[union-attr, arg-type]  # it is required


def docstrings(source: str | bytes) -> list[str]:
    """The docstrings of a module, its classes and functions, dedented; none where the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    return [inspect.cleandoc(text) for text in texts if text and len(text) >= TOO_SHORT]

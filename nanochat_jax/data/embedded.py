"""Real English that stands on every machine with this project: the documentation of Python and of its packages.

The interpreter's help topics (`pydoc_data`), the docstrings of the standard library and of packages that the project
depends on, and the sources of a part of the standard library. A document is one topic, one docstring or one source
file. What comes from one file is either all training or all validation text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path

VERSION = 1  # of the rules below
PACKAGES = ("numpy", "jax", "flax", "optax")
TOO_SHORT = 200  # characters of a docstring that says little
TOO_LONG = 400_000  # characters of a source that is a table rather than a text
SOURCE_CHARS = 20_000  # of a source file taken as a document
VALIDATION_SHARE = 24  # every so manieth file, by the hash of its name
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "_vendor", "pydoc_data"}


class EmbeddedDocuments:
    """Collected when first asked for, in about fifteen seconds, and kept in memory: a few megabytes."""

    @cached_property
    def _split(self) -> tuple[list[str], list[str]]:
        train, val, seen = [], [], set()
        for name, texts in _files():
            held_out = _hash(name) % VALIDATION_SHARE == 0
            for text in texts:
                fingerprint = _hash(text)
                if fingerprint not in seen:  # aliases share their docstrings
                    seen.add(fingerprint)
                    (val if held_out else train).append(text)
        return _shuffled(train), _shuffled(val)

    @property
    def key(self) -> list:
        """What the texts depend on, so that nobody has to collect them to know that they are the same."""
        return ["embedded", VERSION, platform.python_version(), *(f"{p} {metadata.version(p)}" for p in PACKAGES)]

    def train(self) -> Iterator[str]:
        return iter(self._split[0])

    def val(self) -> Iterator[str]:
        return iter(self._split[1])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(texts: list[str]) -> list[str]:
    """An order that depends on the texts alone."""
    return sorted(texts, key=_hash)


def _files() -> Iterator[tuple[str, list[str]]]:
    """(name, documents) of every file that is read."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topics/{name}", [text]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(stdlib):
        source = _read(path)
        documents = docstrings(source)
        if path.parent == stdlib and TOO_SHORT < len(source) < SOURCE_CHARS:
            documents.append(source)
        yield f"stdlib/{path.relative_to(stdlib).as_posix()}", documents
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found and found.origin:
            root = Path(found.origin).parent
            for path in _modules(root):
                yield f"{package}/{path.relative_to(root).as_posix()}", docstrings(_read(path))


def _modules(root: Path) -> list[Path]:
    found = (p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    return sorted(found)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return text if len(text) < TOO_LONG else ""


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, its classes and functions, dedented; none where the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    out = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= TOO_SHORT:
                out.append(inspect.cleandoc(text))
    return out

"""Real English that stands on every machine with this project: the documentation of Python and of its packages.

The interpreter's help topics (`pydoc_data`), the docstrings of the standard library and of packages that the project
depends on, and the sources of a part of the standard library. A document is one topic, one docstring or one source
file. What comes from one file is either all training or all validation text.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from nanochat_jax.config import fingerprint
from nanochat_jax.data.documents import Documents
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text
from nanochat_jax.formats import texts_of

VERSION = 1  # of the rules below
PACKAGES = ("numpy", "jax", "flax", "optax")
TOO_SHORT = 200  # characters of a docstring that says little
TOO_LONG = 400_000  # characters of a source that is a table rather than a text
SOURCE_CHARS = 20_000  # of a source file taken as a document
VALIDATION_SHARE = 24  # one file in so many, by the hash of its name
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "_vendor", "pydoc_data"}


@dataclass(frozen=True)
class EmbeddedDocuments(Documents):
    """Collected when first asked for, in about ten seconds, and kept as JSON lines in the cache: a few megabytes."""

    cache_dir: Path

    @cached_property
    def key(self) -> list:
        """What the texts depend on, so that nobody has to collect them to know that they are the same."""
        return ["embedded", VERSION, platform.python_version(), *(f"{p} {metadata.version(p)}" for p in PACKAGES)]

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
    for name, texts in _files():
        split = val if _hash(name) % VALIDATION_SHARE == 0 else train
        for text in texts:
            digest = _hash(text)
            if digest not in train and digest not in val:
                split[digest] = text
    return [train[digest] for digest in sorted(train)], [val[digest] for digest in sorted(val)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


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
    return sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))


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
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    return [inspect.cleandoc(text) for text in texts if text and len(text) >= TOO_SHORT]

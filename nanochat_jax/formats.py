"""Files of documents.

.parquet                a column of text
.jsonl, .ndjson         a field of the object on each line
.txt                    one document a file, or several where <|endoftext|> stands between them. A document longer than
                        `LONG` is cut at its blank lines, else its lines, for packing takes no more of a document than
                        fits in a row: of a book that is one document nearly nothing would be learned
.gz and .zst            of the latter two, and .json.gz as the hub has it

Plain .json is left alone: that is one value, such as a note beside a download, and not a line each.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from nanochat_jax.errors import UserError

VERSION = 2  # of what documents are made of a file: part of the key of what is packed
LONG = 8_000  # characters of a .txt document: about as many as a row of 2048 tokens holds
BETWEEN = "<|endoftext|>"
KINDS = {".parquet": "parquet", ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def compression_of(path: PurePath) -> str | None:
    return COMPRESSIONS.get(path.suffix.lower())


def kind_of(name: str) -> str | None:
    """parquet, lines or text, by a file's name; None where it is no file of documents."""
    path = PurePath(name.lower())
    compression = compression_of(path)
    suffix = PurePath(path.stem).suffix if compression else path.suffix
    if path.name.startswith(".") or suffix == (".parquet" if compression else ".json"):
        return None
    return KINDS.get(suffix)


def texts_of(path: Path, column: str) -> Iterator[str]:
    """The documents of a file in order, as they are read; empty ones are left out. UserError where it cannot be read,
    or has no such column."""
    kind = kind_of(path.name)
    if kind == "parquet":
        return _parquet_texts(path, column)
    return _line_texts(path, column) if kind == "lines" else _plain_texts(path)


def unreadable(path: Path | str, e: Exception, how: str = "") -> UserError:
    """What to say of an error while a file was read. Libraries' own have no number; the system's are no damage."""
    if isinstance(e, OSError) and e.errno:
        return UserError(f"{path} cannot be read ({os.strerror(e.errno)})")
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    return UserError(f"{path} cannot be read{how} ({reason}); put a whole copy in its place")


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    with opened_parquet(path) as file:
        _check_column(file.schema_arrow, path, column)
        for batch in file.iter_batches(1024, columns=[column], use_threads=False):
            yield from filter(None, batch.column(0).to_pylist())


def _check_column(schema, path: Path, column: str) -> None:
    """UserError where a column is not there, or is no text."""
    import pyarrow

    if column not in schema.names:
        raise UserError(f"{path} has no column `{column}` (data.text_column); it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"column `{column}` (data.text_column) of {path} holds {kind} and not text")


@contextlib.contextmanager
def opened_parquet(path: Path) -> Iterator:
    """The open file. UserError where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise unreadable(path, e, " as parquet") from None


def _line_texts(path: Path, column: str) -> Iterator[str]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = None if line.isspace() else _field(line, column)
            except UserError as e:
                raise UserError(f"{path}, line {number}{e}") from None
            if text:
                yield text


def _field(line: bytes, column: str) -> str | None:
    """UserError: what is wrong, behind the name of the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(" is not JSON; each line of a .jsonl file is an object") from None
    if not isinstance(row, dict) or column not in row:
        has = f"it has {', '.join(row)}" if isinstance(row, dict) else f"it holds {type(row).__name__}"
        raise UserError(f" has no field `{column}` (data.text_column); {has}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f": `{column}` holds {type(text).__name__} and not text")
    return text and whole_text(text)


def whole_text(text: str) -> str:
    """The same text, or one with U+FFFD for halves of characters, which JSON can spell and which are no text."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain_texts(path: Path) -> Iterator[str]:
    """What is not UTF-8 becomes U+FFFD. The file is read as a whole."""
    with opened(path) as file:
        text = file.read().decode("utf-8-sig", "replace").replace("\r\n", "\n")
    for document in text.split(BETWEEN):
        yield from _cut(document)


def _cut(document: str) -> Iterator[str]:
    """A document in parts of at most LONG characters, of which each ends at the last of the best places there are."""
    place = 0
    while len(document) - place > LONG:
        ends = (document.rfind(mark, place + LONG // 2, place + LONG) for mark in ("\n\n", "\n", " "))
        end = next((e for e in ends if e > 0), place + LONG)
        if not (part := document[place:end]).isspace():
            yield part.strip("\n")
        place = end
    rest = document[place:].strip("\n") if place else document
    if rest and not rest.isspace():
        yield rest


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed. UserError where they cannot be read."""
    try:
        if compression := compression_of(path):
            import pyarrow

            with pyarrow.input_stream(str(path), compression=compression) as stream:
                yield io.BufferedReader(stream, 1 << 20)
        else:
            with open(path, "rb") as file:
                yield file
    except OSError as e:
        raise unreadable(path, e) from None


def some(names: list[str], most: int = 3) -> str:
    """The first of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Best fit: which documents make a row together.

Into what is left of a row goes the largest document of a buffer that fits; where none does, the beginning of the
shortest one, or nothing. arXiv 2404.10830.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

D = TypeVar("D")  # a document


class Buffer(Generic[D]):
    """Documents by length. Among those of equal length the one that came first is taken first."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, D]] = []  # sorted; the length, and a number that falls as documents come
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, length: int, document: D) -> None:
        self._number -= 1
        bisect.insort(self._entries, (length, self._number, document))

    def pop_largest(self, room: int) -> D | None:
        """The largest document of at most `room` tokens, or None."""
        i = bisect.bisect_left(self._entries, (room + 1,))
        return self._entries.pop(i - 1)[2] if i else None

    def pop_shortest(self) -> D | None:
        return self.pop_largest(self._entries[0][0])

    def in_order(self) -> list[D]:
        return [document for _, _, document in sorted(self._entries, key=lambda entry: -entry[1])]


def best_fit(
    batches: Iterable[list[D]],
    row_len: int,
    buffer_size: int,
    *,
    crop: bool,
    length: Callable[[D], int] = len,  # type: ignore[assignment]  # documents are sequences unless told otherwise
    buffer: Buffer[D] | None = None,
) -> Iterator[list[tuple[D, int]]]:
    """Rows of (document, tokens taken), from documents that come in batches.

    crop: fill the row's end with the beginning of the shortest document; else leave it, and no document may be longer
    than row_len. The last rows, for which the buffer runs dry, are made too; with crop, one that cannot be filled is
    dropped. Saving the `buffer` between two rows, with the batches not taken yet, allows to resume there.
    """
    batches, dry = iter(batches), False
    buffer = Buffer() if buffer is None else buffer
    while True:
        row, room = [], row_len
        while room > 0:
            while not dry and len(buffer) < buffer_size:
                batch = next(batches, None)
                dry = batch is None
                for document in batch or ():
                    buffer.add(length(document), document)
            if not len(buffer):
                break
            found = buffer.pop_largest(room)
            if found is None and crop:
                found = buffer.pop_shortest()
            if found is None:
                break
            taken = min(length(found), room)
            row.append((found, taken))
            room -= taken
        if not row or (crop and room):
            return
        yield row

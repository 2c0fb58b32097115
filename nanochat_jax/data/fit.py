"""Best fit: which documents make a row together.

Into what is left of a row goes the largest document of a buffer that fits; where none does, the beginning of the
shortest one, or nothing. arXiv 2404.10830.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

D = TypeVar("D")  # a document
_BITS = 40  # of a key that say when its document came


class Buffer(Generic[D]):
    """Documents by length. Among those of equal length the one that came first is taken first."""

    def __init__(self) -> None:
        self._keys: list[int] = []  # sorted; the length, and below it a decreasing sequence number
        self._documents: dict[int, D] = {}
        self._number = 1 << _BITS

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, document: D) -> None:
        self._number -= 1
        key = length << _BITS | self._number
        bisect.insort(self._keys, key)
        self._documents[key] = document

    def pop_largest(self, room: int) -> D | None:
        """The largest document of at most `room` tokens, or None."""
        i = bisect.bisect_left(self._keys, (room + 1) << _BITS)
        return self._documents.pop(self._keys.pop(i - 1)) if i else None

    def pop_shortest(self) -> D | None:
        return self.pop_largest(self._keys[0] >> _BITS)

    def in_order(self) -> list[D]:
        """The documents in the order in which they came."""
        return [self._documents[key] for key in sorted(self._keys, key=lambda key: -(key & ((1 << _BITS) - 1)))]


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

"""safetensors files: the size of a JSON header, the header, the arrays.

Written here, and not by the package of that name, because the same arrays and notes must give the same bytes: that one
writes the notes in an order that changes from call to call. Reading maps the file and copies nothing.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from nanochat_jax.errors import UserError

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()}
ALIGNMENT = 8  # of the arrays; the header is padded with spaces


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """Writes the arrays, in the order of their names, and `notes` as the header's __metadata__."""
    header: dict = {"__metadata__": dict(notes)}
    start = 0
    for name, array in sorted(tensors.items()):
        end = start + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in sorted(tensors.items()):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays as views of the file, notes). UserError where it is no whole safetensors file."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
        data = np.memmap(path, np.uint8, "r", start)
        notes = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = data[first:last].view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    except KeyError as e:
        raise UserError(f"{path} holds arrays of type {e}; known are {', '.join(TYPES)}") from None
    except (OSError, ValueError, TypeError, AttributeError, MemoryError, OverflowError) as e:
        raise UserError(f"{path} is not a whole safetensors file ({e})") from None
    return tensors, notes

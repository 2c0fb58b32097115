"""What karpathy/nanochat writes: model_*.pt by PyTorch, and tokenizer.pkl, a tiktoken encoding.

Both are pickles, which may name any function to be called. Here they may name those below and no others, so that
neither package is needed and nothing else runs.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np

from nanochat_jax.errors import UserError

FLOATS = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16}


class _Unpickler(pickle.Unpickler):
    """`known`: (module, name) -> what stands for it; `storage`: name -> the bytes of a flat array of PyTorch's."""

    def __init__(self, file, known: dict, storage=None):
        super().__init__(file)
        self._known, self._storage = known, storage

    def find_class(self, module: str, name: str):
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return self._known[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid
        return np.frombuffer(self._storage(key), dtype)[:numel]


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    strides = [s * storage.itemsize for s in stride]
    return np.ndarray(size, storage.dtype, storage, offset * storage.itemsize, strides)  # checks the bounds


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that torch.save made of a state dict. UserError."""
    known: dict = {("torch", f"{name}Storage"): dtype for name, dtype in FLOATS.items()}
    known |= {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _tensor}
    try:
        with zipfile.ZipFile(path) as archive:
            (record,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = record.removesuffix("data.pkl")
            with archive.open(record) as file:
                state = _Unpickler(file, known, lambda key: archive.read(f"{folder}data/{key}")).load()
        return {name.removeprefix("_orig_mod."): array for name, array in state.items()}
    except Exception as e:  # of a pickle that is none, anything
        raise UserError(f"{path} is not a state dict that PyTorch saved ({e})") from None


class _Encoding:
    """Stands for tiktoken.Encoding: keeps its state, a dictionary or, of those that tiktoken ships, a name."""

    def __setstate__(self, state) -> None:
        self.state = state


def read_tiktoken(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """(ranks, pattern, special tokens) of a pickled encoding. UserError."""
    try:
        with open(path, "rb") as file:
            state = _Unpickler(file, {("tiktoken.core", "Encoding"): _Encoding}).load().state
        return state["mergeable_ranks"], state["pat_str"], state["special_tokens"]
    except Exception as e:
        raise UserError(f"{path} is not a tiktoken encoding of a vocabulary of its own ({e})") from None

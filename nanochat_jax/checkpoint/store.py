"""What a checkpoint folder, `<stage>/checkpoints/<step>`, holds, and how damage to it is found.

Three items: `state` (parameters, optimizer, step), `meta` (the caller's JSON: seed, tokenizer hash, last metrics) and
`arrays` (JSON: shape, type and checksum of every array). Orbax writes into a temporary folder and renames it at the
end, so a folder whose name is a number is complete, even if the process was killed. Later damage is found by a CRC of
the JSON, a list of the state's files, and the checksums: otherwise changed bytes would pass for parameters.
"""

import itertools
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nanochat_jax.cli import explained
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts

REFUSALS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")  # TensorStore's words for what is no damage


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved; the message says why."""


class _ListedHandler(ocp.BasePyTreeCheckpointHandler):
    """Orbax's handler for pytrees, which also writes a list of its files as the last of them."""

    LIST, SMALL = "files.json", 1 << 20  # bytes; of larger files only the size is noted: the arrays have checksums

    def finalize(self, directory) -> None:  # on process 0, when all have written
        super().finalize(directory)
        folder = Path(directory)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        noted = {str(p.relative_to(folder)): self.describe(p) for p in files}
        (folder / self.LIST).write_text(json.dumps(noted, indent=1))

    @classmethod
    def describe(cls, path: Path) -> list[int]:
        """[size] or, of a small file, [size, CRC-32]."""
        size = path.stat().st_size
        return [size, zlib.crc32(path.read_bytes())] if size <= cls.SMALL else [size]


def handlers() -> dict:
    """How each item is stored. Uncompressed: zstd takes four times the processor time to save 8 % of the bytes."""
    listed = _ListedHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    return {
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, handler_impl=listed),
        "meta": ocp.JsonCheckpointHandler(),
        "arrays": ocp.JsonCheckpointHandler(),
    }


def to_save(state: Any, meta: dict) -> ocp.args.Composite:
    """Orbax's arguments for a pytree of arrays and plain JSON; both may change as soon as this has returned."""
    meta = json.loads(json.dumps(meta))  # a copy: the writer reads it later
    arrays = _describe(state)
    if jax.default_backend() == "cpu":
        # Elsewhere Orbax copies to the host before it returns. Here its copy is a view of the very buffer that the
        # next step wants to write to; the view makes jax 0.10 refuse the donation, but nothing promises that.
        state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        meta=ocp.args.JsonSave({"crc32": _crc(meta), "value": meta}),
        arrays=ocp.args.JsonSave({"crc32": _crc(arrays), "value": arrays}),
    )


# ------------------------------------------------------------------------------------------------ reading


def read(path: Path, abstract: Any) -> tuple[Any, dict]:
    """The arrays of `abstract` (the whole state, or {"params": ...} of it) and the meta record. Damaged, UserError.

    Leaves are jax.ShapeDtypeStructs; one without a sharding comes back as a NumPy array. On several hosts every process
    calls this, reads what its devices hold, and raises where another one did.
    """
    error: Exception | None = None
    try:
        arrays, meta = read_records(path)
        check_files(path)
        _check_shapes(path, arrays, abstract)
        state = _read_arrays(path, abstract)
    except Exception as e:
        error = e
    agree(error)
    wrong = [name for name, found in _describe(state).items() if found != arrays[name]]
    agree(Damaged(f"{wrong[0]} is not what was saved") if wrong else None)
    return state, meta


def read_records(path: Path) -> tuple[dict, dict]:
    """(arrays, meta): name -> {"shape", "dtype", "checksum"}, and what the caller saved with the state. Damaged."""
    found = []
    for item in ("arrays", "meta"):
        with _damaged(f"its record {item}"):
            record = json.loads((path / item / "metadata").read_bytes())
            if {"crc32", "value"} & record.keys():  # older checkpoints have the value alone
                if record.get("crc32") != _crc(record.get("value")):
                    raise ValueError
                record = record["value"]
            found.append(record)
    return found[0], found[1]


def check_files(path: Path) -> None:
    """Damaged, in one line, where a file is missing or has changed; Orbax would say so in hundreds."""
    folder = path / "state"
    with _damaged(f"its file {_ListedHandler.LIST}"):
        noted = json.loads((folder / _ListedHandler.LIST).read_bytes()).items()
    for name, description in noted:
        with _damaged(f"its file {name}"):
            if _ListedHandler.describe(folder / name) != description:
                raise ValueError


@contextmanager
def _damaged(what: str) -> Iterator[None]:
    """Turns a missing file, or a ValueError about one, into Damaged."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{what} is missing") from None
    except (ValueError, AttributeError):  # not text, not JSON, not a dictionary, or a wrong CRC
        raise Damaged(f"{what} is not what was written") from None


def verify(path: Path, at_once: int = 1 << 28) -> tuple[int, int]:
    """(arrays, bytes) of a checkpoint whose every array is what was saved. Damaged.

    Some `at_once` bytes of arrays are read together, which takes three times that of memory.
    """
    arrays, _ = read_records(path)
    check_files(path)
    with _orbax() as handler:
        saved = handler.metadata(path / "state").tree
    ends = list(itertools.accumulate(map(array_bytes, arrays.values())))
    for _, group in itertools.groupby(zip(arrays, ends), lambda pair: pair[1] // at_once):
        names = {name for name, _ in group}
        wanted = jax.tree_util.tree_map_with_path(
            lambda at, x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _name(at) in names else ocp.PLACEHOLDER,  # noqa: B023
            saved,
        )
        state = _read_arrays(path, wanted, partial=False)
        found = _describe({name: x for name, x in _named(state) if x is not ocp.PLACEHOLDER})
        for name in names:
            if found.get(name) != arrays[name]:
                raise Damaged(f"{name} is not what was saved")
    return len(arrays), ends[-1]


def array_bytes(array: dict) -> int:
    return math.prod(array["shape"]) * jnp.dtype(array["dtype"]).itemsize


def _read_arrays(path: Path, abstract: Any, partial: bool = True) -> Any:
    """The leaves of `abstract` that are jax.ShapeDtypeStructs; `partial`: it may leave others out.

    Every process reads by itself, without Orbax's barriers: where it fails on one, `agree` tells the others.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)
    with _orbax() as handler:
        return handler.restore(path / "state", args=args)


@contextmanager
def _orbax() -> Iterator[ocp.PyTreeCheckpointHandler]:
    """The state's reader. Its errors become Damaged, except for what the system refuses: files that are not there are
    found by `check_files`."""
    handler = handlers()["state"]
    try:
        yield handler
    except Exception as e:
        missing = isinstance(e, (FileNotFoundError, NotADirectoryError))
        if isinstance(e, MemoryError) or any(code in str(e) for code in REFUSALS) or not missing and explained(e):
            raise
        raise Damaged(one_line(e)) from e
    finally:
        handler.close()


def one_line(e: Exception) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text:.200}" if text else type(e).__name__


def _check_shapes(path: Path, saved: dict, abstract: Any) -> None:
    """UserError where the checkpoint holds other arrays than are asked for: it was made with other settings."""
    for name, leaf in _named(abstract):
        want = f"{leaf.dtype}{list(leaf.shape)}"
        have = f"{saved[name]['dtype']}{saved[name]['shape']}" if name in saved else "no such array"
        if want != have:
            raise UserError(
                f"checkpoint {path} was made with other settings: {name} is {have} there and {want} here; take the "
                "settings that it was made with, or another run directory"
            )


def agree(error: Exception | None) -> None:
    """Raises on every process where one of them met an error: its own there, a note of it elsewhere.

    Every process must call it, with its error or None.
    """
    mine = 0 if error is None else 1 if isinstance(error, Damaged) else 2
    worst = max(hosts.gather("errors compared", mine))
    if error is not None and mine == worst:
        raise error
    if worst:
        raise Damaged("another host cannot read it") if worst == 1 else UserError("another host failed; it says why")


# ----------------------------------------------------------------------------------------------- checksums


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _named(tree: Any) -> list[tuple[str, Any]]:
    """[("params/wte/embedding", leaf), ...]"""
    return [(_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum of x's bits as integers, each times its odd place (2 i + 1), modulo 2^32: uint32 scalar.

    Any single element that changes changes it, and so do elements that change places. Sums of integers do not depend on
    their order, so it is the same on every mesh, and the devices that hold the array make it; all of them get it.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _describe(state: Any) -> dict[str, dict]:
    """name -> {"shape", "dtype", "checksum"} of every array."""
    # one after the other: simulated devices share few threads, where several sums at once can lock each other out
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": int(jax.device_get(_checksum(x)))}
        for name, x in _named(state)
    }

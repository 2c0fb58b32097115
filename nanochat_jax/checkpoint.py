"""Checkpoints by Orbax: asynchronous, atomic, checked, restored bit for bit onto whatever mesh is asked for.

A checkpoint, `<stage>/checkpoints/<step>`, holds three items: `state` (parameters, optimizer, step), `meta` (JSON of
the caller's: seed, tokenizer hash, last metrics) and `arrays` (JSON: shape, type and checksum of every array). Orbax
writes into a folder of another name and renames it at the end, so what is called by a number is whole, whenever the
process was killed. What happens to it later is found by the sizes of its files and by the checksums: without them,
bytes that changed would pass for parameters.

A stage that has ended leaves `<stage>/done.json`. `load_model` is how everything but training gets at a model.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml

from nanochat_jax.config import RunConfig, from_dict
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, claim, read_json

STAGES = ("base", "mid", "sft", "rl")  # those that leave a model, in order


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved; the message says why."""


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


class _ListedHandler(ocp.BasePyTreeCheckpointHandler):
    """Orbax's way to store a pytree, and a list of the files that it made, as the last one of them."""

    LIST, SMALL = "files.json", 1 << 20  # bytes; of larger files only the size is noted: the arrays have checksums

    def finalize(self, directory) -> None:
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

    @classmethod
    def check(cls, folder: Path) -> None:
        """Damaged, in a line, where a file is missing or other than noted; Orbax would say so in hundreds."""
        try:
            noted = json.loads((folder / cls.LIST).read_text())
        except (OSError, ValueError) as e:
            raise Damaged(f"its {cls.LIST} cannot be read ({type(e).__name__})") from e
        for name, description in noted.items():
            if not (folder / name).is_file():
                raise Damaged(f"its file {name} is missing")
            if cls.describe(folder / name) != description:
                raise Damaged(f"its file {name} is not what was written")


def _handlers() -> dict:
    """How each item is stored. Uncompressed: zstd takes four times the processor time to save 8 % of the bytes."""
    listed = _ListedHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    return {
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, handler_impl=listed),
        "meta": ocp.JsonCheckpointHandler(),
        "arrays": ocp.JsonCheckpointHandler(),
    }


class Checkpointer:
    """Checkpoints of one stage under `directory`, of which the newest `keep` stay.

    One process at a time may hold a directory: UserError where another one is training there. What a killed process
    left half-written is removed.
    """

    def __init__(self, directory: str | Path, keep: int = 2, say: Callable[[str], None] = _warn):
        self.directory, self._say = Path(directory).absolute(), say
        self._claim = claim(self.directory / ".lock") if jax.process_index() == 0 else None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers=_handlers(),
        )

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Copies `state` (a pytree of arrays) and `meta` (plain JSON) to the host, then writes in the background.

        The caller may donate the state's buffers as soon as this returns. A step that is there already stays as it is.
        UserError where the save before this one failed.
        """
        self.wait()
        if step in saved_steps(self.directory):
            return
        meta = json.loads(json.dumps(meta))  # the writer reads it later, when the caller may have changed it
        state = jax.tree.map(_raw, state)
        arrays = _describe(state)
        if jax.default_backend() == "cpu":
            # Elsewhere Orbax copies to the host before it returns. Here its copy is a view of the very buffer that the
            # next step wants to write to; the view makes jax 0.10 refuse the donation, but nothing promises that.
            state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta), arrays=ocp.args.JsonSave(arrays)
        )
        try:
            begun = self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(e) from e
        if not begun:
            raise ValueError(f"step {step} comes before the newest checkpoint of {self.directory}")

    def latest(self) -> int | None:
        """The newest step that is on the disk, or None."""
        return max(saved_steps(self.directory), default=None)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, meta) of `step`, or of the newest checkpoint that can be read.

        abstract_state: the state's pytree of jax.ShapeDtypeStruct; each array comes back bit for bit, with the
        sharding that is asked for there, whatever mesh it was saved from. A damaged checkpoint is reported in one line,
        put aside as `<step>.damaged`, and the one before it taken. UserError where none is left, or the shapes differ.
        """
        self.wait()
        state, meta, found, damaged = _newest_readable(self.directory, abstract_state, step, self._say)
        for bad in damaged if step is None else ():
            aside = self.directory / f"{bad}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(bad)).rename(aside)
        if damaged:
            self._manager.reload()
        return state, meta

    def wait(self) -> None:
        """Returns when the last save is on the disk. UserError where it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as e:
            raise self._failed(e) from e

    def _failed(self, e: Exception) -> UserError:
        return UserError(
            f"a checkpoint could not be written to {self.directory} ({_one_line(e)}); make room or mend the disk, and "
            "the same command goes on from the checkpoint before"
        )

    def close(self) -> None:
        """Waits for the last save, and lets go of the directory. UserError where the save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._claim:
                self._claim.close()


# ------------------------------------------------------------------------------------------------ reading


def saved_steps(directory: str | Path) -> list[int]:
    """The steps of the checkpoints that are complete, ascending."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def _newest_readable(directory: Path, abstract: Any, step: int | None, say) -> tuple[Any, dict, int, list[int]]:
    """(state, meta, step, newer steps that are damaged)."""
    directory, damaged = directory.absolute(), []  # Orbax takes no other paths
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f"{directory} holds no checkpoint of step {step}; it holds {steps or 'none'}")
    for candidate in reversed(steps) if step is None else [step]:
        try:
            state, meta = _read(directory / str(candidate), abstract)
            return state, meta, candidate, damaged
        except Damaged as e:
            say(f"checkpoint {candidate} in {directory} is damaged and left out: {e}")
            damaged.append(candidate)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint yet")
    raise UserError(f"no checkpoint in {directory} can be read; remove that folder to train the stage anew")


def _read(path: Path, abstract: Any) -> tuple[Any, dict]:
    """The arrays of `abstract` (the whole state, or {"params": ...} of it) and the meta record. Damaged, UserError."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers())) as reader:
        json_args = ocp.args.Composite(meta=ocp.args.JsonRestore(), arrays=ocp.args.JsonRestore())
        notes = _or_damaged(lambda: reader.restore(path, args=json_args))
        if not notes.get("arrays") or notes.get("meta") is None:
            raise Damaged("its records are missing")
        _ListedHandler.check(path / "state")
        raw = jax.tree.map(_raw_abstract, abstract)
        _check_shapes(path, notes.arrays, raw)
        state_args = ocp.args.PyTreeRestore(
            item=raw, restore_args=ocp.checkpoint_utils.construct_restore_args(raw), partial_restore=True
        )
        state = _or_damaged(lambda: reader.restore(path, args=ocp.args.Composite(state=state_args)).state)
    for name, found in _describe(state).items():
        if found != notes.arrays[name]:
            raise Damaged(f"{name} is not what was saved")
    return jax.tree.map(_wrap, state, abstract), notes.meta


def _or_damaged(read: Callable[[], Any]) -> Any:
    """read(), with what the storage layers raise on a bad file as Damaged. Lack of memory or of rights is no damage."""
    try:
        return read()
    except (MemoryError, PermissionError):
        raise
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e) or "PERMISSION_DENIED" in str(e):
            raise
        raise Damaged(_one_line(e)) from e


def _one_line(e: Exception, limit: int = 200) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text[:limit]}" if text else type(e).__name__


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


# ----------------------------------------------------------------------------------------------- checksums


def _named(tree: Any) -> list[tuple[str, Any]]:
    """[("params/wte/embedding", leaf), ...]"""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum of x's bits as integers, each times its odd place (2 i + 1), modulo 2^32: uint32 scalar.

    Any single element that changes changes it, and so do elements that change places. Sums of integers do not depend on
    their order, so it is the same on every mesh, and the device that holds the array makes it.
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
    sums = jax.device_get({name: _checksum(x) for name, x in _named(state)})
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": int(sums[name])} for name, x in _named(state)
    }


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: jax.Array) -> jax.Array:
    """PRNG keys as their bits, everything else as it is."""
    return jax.random.key_data(x) if _is_key(x) else x


def _raw_abstract(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not _is_key(x):
        return x
    raw = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=x.sharding)


def _wrap(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), like.dtype))) if _is_key(like) else x


# ---------------------------------------------------------------------------------------------- done marks


def write_done(stage_dir: str | Path, mark: dict) -> None:
    """Marks the stage as ended; `mark` ({"seconds", "metrics", "steps", ...}) becomes its done.json."""
    atomic_write_json(Path(stage_dir) / "done.json", mark)


def read_done(stage_dir: str | Path) -> dict | None:
    """What the stage left when it ended, or None."""
    return read_json(Path(stage_dir) / "done.json")


# ------------------------------------------------------------------------------------------- for inference


@dataclass
class Loaded:
    model: Any  # nanochat_jax.model.GPT
    tokenizer: Any  # tokenizer.Tokenizer
    config: RunConfig
    meta: dict  # of the checkpoint
    stage: str
    step: int


def load_model(
    run_dir: str | Path,
    stage: str | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    say: Callable[[str], None] = _warn,
) -> Loaded:
    """The newest model of a stage, its tokenizer and the run's configuration. Only the parameters are read.

    stage: base, mid, sft or rl, ended or not; None: the latest that has ended. dtype of the matrix products: None for
    the configuration's. mesh: shards the parameters by the rules of sharding.py; None: they are put on the default
    device, uncommitted. UserError, in one line, where the run or the stage is not there, or the tokenizer is not the
    one that the stage was trained with.
    """
    from nanochat_jax import devices, scaling, sharding
    from nanochat_jax.model import graph_of, init_params, merge
    from tokenizer import Tokenizer

    run_dir = Path(run_dir)
    stage = _choose_stage(run_dir, stage)
    # not load_config: a run can be used where its data folder is not at hand
    config = from_dict(RunConfig, yaml.safe_load((run_dir / "config.yaml").read_text()))
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    cfg = scaling.gpt_config(config.model, tokenizer.vocab_size)
    abstract = {"params": jax.eval_shape(lambda: init_params(cfg, 0))}
    if mesh is not None:
        abstract = sharding.abstract(abstract, mesh)
    state, meta, step, _ = _newest_readable(run_dir / stage / "checkpoints", abstract, None, say)
    if meta.get("tokenizer") != tokenizer.hash:
        raise UserError(
            f"{run_dir / 'tokenizer'} is not the tokenizer that stage {stage} was trained with; put that one back, or "
            f"remove {run_dir / stage} and train the stage anew"
        )
    params = state["params"] if mesh is not None else jax.tree.map(jnp.asarray, state["params"])
    graph = graph_of(cfg, devices.compute_dtype(config.dtype) if dtype is None else dtype)
    return Loaded(merge(graph, params), tokenizer, config, meta, stage, step)


def _choose_stage(run_dir: Path, stage: str | None) -> str:
    """`stage` if it holds a checkpoint, or the latest stage that has ended. UserError."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run directory (it has no config.yaml); train one with run_speedrun.py")
    trained = [s for s in STAGES if saved_steps(run_dir / s / "checkpoints")]
    ended = [s for s in trained if read_done(run_dir / s)]
    if stage is None and ended:
        return ended[-1]
    if stage is None:
        raise UserError(
            f"no stage of {run_dir} has ended yet; run run_speedrun.py --run-dir {run_dir} to its end"
            + (f", or take stage {trained[-1]} as it is now by its name" if trained else "")
        )
    if stage not in trained:
        raise UserError(f"{run_dir} has no trained stage {stage}; it has {', '.join(trained) or 'none yet'}")
    return stage

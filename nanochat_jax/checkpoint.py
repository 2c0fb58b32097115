"""Checkpoints by Orbax: asynchronous, atomic, restored bit for bit onto whatever mesh is asked for.

A checkpoint holds the train state (parameters, optimizer, step) and a JSON record (seed, tokenizer hash, data position,
last metrics). A stage that has ended leaves `done.json` beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from nanochat_jax.config import RunConfig, load_config
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json

STAGES = ("base", "mid", "sft", "rl")


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


class Checkpointer:
    """Checkpoints of one stage under `directory`, the newest `keep` of them."""

    def __init__(self, directory: str | Path, keep: int = 2, say: Callable[[str], None] = _warn):
        self._say = say
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True),
        )

    def save(self, step: int, state, meta: dict) -> None:
        """Copies the state to the host, then writes in the background. Raises if the save before this one failed.

        The caller may donate the state's buffers as soon as this returns. A step that is there already is kept.
        """
        self._manager.check_for_errors()
        if step in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":  # there a host copy is a view of the buffer that the next step overwrites
            state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, abstract_state, step: int | None = None) -> tuple[Any, dict]:
        """The state of `step`, or of the newest checkpoint that can be read, in the shapes and shardings asked for.

        A damaged checkpoint is reported in a line and the one before it is taken. UserError where none can be read.
        """
        steps = [step] if step is not None else sorted(self._manager.all_steps(), reverse=True)
        for candidate in steps:
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
                out = self._manager.restore(candidate, args=args)
                return out.state, out.meta
            except Exception as e:  # whatever the storage layers raise on a damaged file
                self._say(f"checkpoint {candidate} of {self._manager.directory} cannot be read ({type(e).__name__})")
                if candidate == steps[-1] and not _is_damage(e):
                    raise
        raise UserError(f"no checkpoint in {self._manager.directory} can be read; remove the folder to train anew")

    def wait(self) -> None:
        """Returns when the last save is on the disk; raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()


def _is_damage(error: Exception) -> bool:
    """A file that is missing or not what it should be, rather than a state of other shapes."""
    return isinstance(error, OSError) or "DATA_LOSS" in str(error) or "NOT_FOUND" in str(error)


# ----------------------------------------------------------------------------------------------- done marks


def write_done(stage_dir: Path, mark: dict) -> None:
    atomic_write_json(Path(stage_dir) / "done.json", mark)


def read_done(stage_dir: Path) -> dict | None:
    """What the stage left when it ended, or None."""
    return read_json(Path(stage_dir) / "done.json")


# ------------------------------------------------------------------------------------------ for inference


@dataclass
class Loaded:
    model: Any  # nanochat_jax.model.GPT
    tokenizer: Any  # tokenizer.Tokenizer
    config: RunConfig
    meta: dict
    stage: str


def load_params(stage_dir: Path, abstract_params) -> tuple[dict, dict]:
    """Only the parameters of a stage's newest checkpoint, and its meta record."""
    manager = ocp.CheckpointManager(Path(stage_dir).absolute() / "checkpoints")
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{stage_dir} holds no checkpoint yet")
    args = ocp.args.PyTreeRestore(
        item={"params": abstract_params},
        restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract_params}),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as reader:
        params = reader.restore(manager.directory / str(step) / "state", args=args)["params"]
    meta = json.loads((manager.directory / str(step) / "meta" / "metadata").read_text())
    manager.close()
    return params, meta


def load_model(run_dir: str | Path, stage: str | None = None, dtype=None) -> Loaded:
    """The model of a stage (None: the latest that has ended), its tokenizer and the run's configuration.

    UserError, in one line, where the run or the stage is not there or the tokenizer is not the one it was trained with.
    """
    from nanochat_jax import scaling, train
    from nanochat_jax.stages.common import compute_dtype
    from tokenizer import Tokenizer

    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run directory (it has no config.yaml); train one with run_speedrun.py")
    trained = [s for s in STAGES if (run_dir / s / "checkpoints").is_dir()]
    if stage is None:
        ended = [s for s in trained if read_done(run_dir / s)]
        if not ended:
            raise UserError(f"no stage of {run_dir} has ended yet; run run_speedrun.py --run-dir {run_dir}")
        stage = ended[-1]
    if stage not in trained:
        raise UserError(f"{run_dir} has no stage {stage}; it has {', '.join(trained) or 'none yet'}")
    config = load_config(run_dir / "config.yaml")
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    cfg = scaling.gpt_config(config.model, tokenizer.vocab_size)
    graph = train.graph_of(cfg, dtype or compute_dtype(config.dtype))
    abstract = jax.eval_shape(lambda: train.init_params(cfg, 0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    params, meta = load_params(run_dir / stage, abstract)
    if meta["tokenizer"] != tokenizer.hash:
        raise UserError(f"{run_dir / 'tokenizer'} is not the tokenizer that stage {stage} was trained with")
    return Loaded(train.merge(graph, params), tokenizer, config, meta, stage)

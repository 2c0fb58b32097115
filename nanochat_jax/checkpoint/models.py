"""Loads a trained model from a run directory, and the mark of a finished stage, `<stage>/done.json`.

`load_model` is how everything but training gets a model. A stage with a lora_rank keeps only adapters to the model of
an earlier stage, which its meta record names: the two are merged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.checkpoint import store
from nanochat_jax.checkpoint.manager import newest_readable, saved_steps, warn
from nanochat_jax.config import RunConfig, fingerprint, read_run_config
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, read_json
from nanochat_jax.rules import STAGES


def write_done(stage_dir: str | Path, mark: dict) -> None:
    """Marks the stage as finished; `mark` ({"seconds", "metrics", "steps", ...}) becomes its done.json."""
    atomic_write_json(Path(stage_dir) / "done.json", mark)


def read_done(stage_dir: str | Path) -> dict | None:
    return read_json(Path(stage_dir) / "done.json")


@dataclass
class Loaded:
    model: Any  # nanochat_jax.model.GPT
    tokenizer: Any  # tokenizer.Tokenizer
    config: RunConfig
    meta: dict  # of the checkpoint
    stage: str
    step: int
    identity: str = ""  # hex digits that tell its parameters from others

    @property
    def params(self) -> dict:
        from flax import nnx

        return nnx.to_pure_dict(nnx.split(self.model)[1])


def adapters_of(stage_dir: str | Path) -> dict | None:
    """{"rank", "from", "identity"} of a stage that trains adapters: their rank, the stage whose model they change and
    that model's identity. None for other stages, and before the first checkpoint."""
    folder = Path(stage_dir) / "checkpoints"
    for step in reversed(saved_steps(folder)):
        try:
            return store.read_records(folder / str(step))[1].get("lora")
        except store.Damaged:  # whoever reads its arrays will say so
            continue
    return None


def load_changed(run_dir: str | Path, stage: str, adapters: dict, mesh: jax.sharding.Mesh | None = None) -> Loaded:
    """The model that the adapters of `stage` change, as load_model gives it. UserError where it is another."""
    loaded = load_model(run_dir, adapters["from"], mesh)
    if loaded.identity != adapters["identity"]:
        raise UserError(
            f"{run_dir}/{loaded.stage} is not the model that stage {stage} was trained on; put that one back, or "
            "take another run directory"
        )
    return loaded


def load_model(run_dir: str | Path, stage: str | None = None, mesh: jax.sharding.Mesh | None = None) -> Loaded:
    """The newest model of a stage, its tokenizer and the run's configuration. Only the parameters are read.

    stage: base, mid, sft or rl, finished or not; None: the latest finished one. mesh: shards the parameters by the
    rules of sharding.py; None: they are put on the default device, uncommitted. UserError where the run or the stage is
    missing, or was trained with another tokenizer.
    """
    from nanochat_jax import devices
    from nanochat_jax.mesh import sharding
    from nanochat_jax.model import lora, scaling
    from nanochat_jax.model.gpt import graph_of, init_params, merge
    from tokenizer import load_tokenizer

    run_dir = Path(run_dir)
    config = read_run_config(run_dir)
    stage = _choose_stage(run_dir, stage)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    cfg = scaling.gpt_config(config.model, tokenizer.vocab_size)
    adapters = adapters_of(run_dir / stage)
    made = (lambda: lora.init(cfg, adapters["rank"], 0)) if adapters else (lambda: init_params(cfg, 0))
    abstract = {"params": jax.eval_shape(made)}
    if mesh is not None:
        abstract = sharding.abstract(abstract, mesh)
    state, meta, step, _ = newest_readable(run_dir / stage / "checkpoints", abstract, warn)
    if meta.get("tokenizer") != tokenizer.hash:
        raise UserError(
            f"{run_dir / 'tokenizer'} is not the tokenizer that stage {stage} was trained with; put that one back, or "
            "take another run directory"
        )
    params = state["params"] if mesh is not None else jax.tree.map(jnp.asarray, state["params"])
    try:
        arrays, _ = store.read_records(run_dir / stage / "checkpoints" / str(step))
        identity = fingerprint({k: v for k, v in arrays.items() if k.startswith("params/")})
    except store.Damaged:  # it was read just now: the run that trains there has removed it for a newer one
        identity = ""
    if adapters:
        below = load_changed(run_dir, stage, adapters, mesh)
        frozen = below.params
        split = None if mesh is None else sharding.tree_shardings(frozen, mesh)
        params = jax.jit(lora.merged, out_shardings=split)(frozen, params)
        identity = fingerprint([below.identity, identity])
    model = merge(graph_of(cfg, devices.compute_dtype(config.dtype)), params)
    return Loaded(model, tokenizer, config, meta, stage, step, identity)


def _choose_stage(run_dir: Path, stage: str | None) -> str:
    """`stage` if it holds a checkpoint, or the latest finished stage. UserError."""
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

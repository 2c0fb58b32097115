"""Where records go beside metrics.jsonl: TensorBoard's event files, Weights & Biases. Both get the records as they are.

uv run --extra tensorboard run_speedrun.py tracking.tensorboard=true    # tensorboard --logdir RUN_DIR/tensorboard
uv run --extra wandb run_speedrun.py tracking.wandb=PROJECT             # WANDB_MODE=offline without a network
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

from nanochat_jax.config import TrackingConfig, fingerprint
from nanochat_jax.errors import UserError


class Sink(Protocol):
    def write(self, record: dict) -> None:
        """Takes a record of `tracking.Tracker`."""

    def close(self) -> None: ...


def check(config: TrackingConfig) -> None:
    """UserError where a package is missing that a setting needs."""
    for setting, package, extra in (
        (config.tensorboard, "tensorboardX", "tensorboard"),
        (config.wandb, "wandb", "wandb"),
    ):
        if setting and importlib.util.find_spec(package) is None:
            raise UserError(f"tracking.{extra} needs the package {package}: uv sync --extra {extra}, or leave it out")


def open_sinks(config: TrackingConfig, run_dir: Path, stage: str, start: int) -> list[Sink]:
    """The sinks that are switched on, for the records of `stage` after step `start`."""
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard" / stage, start))
    if config.wandb:
        sinks.append(WandB(config.wandb, run_dir, stage))
    return sinks


def numbers(record: dict) -> dict[str, float]:
    """What can be drawn: all but the step, the clock, and what is text or null."""
    named = {k: v for k, v in record.items() if k not in ("step", "of", "time")}
    return {k: v for k, v in named.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


class TensorBoard:
    """One folder a stage, so that the curves of the stages lie over each other; tags are the names of the records."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX import SummaryWriter

        # what a run that was killed wrote after its last checkpoint is hidden
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)

    def write(self, record: dict) -> None:
        step, clock = record["step"], record["time"]
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, step, walltime=clock)
        for name in ("alarm", "sample"):
            if name in record:
                self._writer.add_text(name, record[name], step, walltime=clock)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One run for all stages, whose names are `stage/name`; the same one again when the run directory is taken up."""

    def __init__(self, project: str, run_dir: Path, stage: str):
        import wandb

        self._stage = stage
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=fingerprint(str(run_dir.resolve())),
                resume="allow",
                dir=str(run_dir),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as e:
            raise UserError(
                f"wandb does not start ({' '.join(str(e).split())}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, record: dict) -> None:
        texts = {k: record[k] for k in ("alarm", "sample") if k in record}
        row = {"step": record["step"], **numbers(record), **texts}
        self._run.log({f"{self._stage}/{k}": v for k, v in row.items()})

    def close(self) -> None:
        self._run.finish()

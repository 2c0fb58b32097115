"""Where records go beside metrics.jsonl: TensorBoard's event files and Weights & Biases. Both get whole records.

uv run --extra tensorboard run_speedrun.py tracking.tensorboard=true    # tensorboard --logdir RUN_DIR/tensorboard
uv run --extra wandb run_speedrun.py tracking.wandb=PROJECT             # WANDB_MODE=offline without a network
"""

import importlib.util
import secrets
from pathlib import Path

from nanochat_jax.config import TrackingConfig
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text


def check(config: TrackingConfig) -> None:
    """UserError where a package is missing that a setting needs."""
    for extra, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(config, extra) and importlib.util.find_spec(package) is None:
            raise UserError(f"tracking.{extra} needs the package {package}: uv sync --extra {extra}, or leave it out")


def numbers(record: dict) -> dict[str, float]:
    """What can be drawn: all but the step, the clock, and what is text or null."""
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "of", "time")}


def texts(record: dict) -> dict[str, str]:
    return {k: record[k] for k in ("alarm", "sample") if k in record}


class TensorBoard:
    """One folder per stage, so that the curves of the stages overlap; tags are the keys of the records."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX import SummaryWriter

        # what a run that was killed wrote after its last checkpoint is hidden
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)

    def write(self, record: dict) -> None:
        step, clock = record["step"], record["time"]
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, step, walltime=clock)
        for name, text in texts(record).items():
            self._writer.add_text(name, text, step, walltime=clock)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One run for all stages, with keys `stage/name`; the same one again when the run is resumed."""

    def __init__(self, project: str, run_dir: Path, stage: str):
        import wandb

        self._stage, id_file = stage, run_dir / "wandb-id"
        if not id_file.is_file():  # another run at the same place, or of another machine, has another
            atomic_write_text(id_file, secrets.token_hex(6))
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=id_file.read_text(),
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
        row = {"step": record["step"], **numbers(record), **texts(record)}
        self._run.log({f"{self._stage}/{k}": v for k, v in row.items()})

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: TrackingConfig, run_dir: Path, stage: str, start: int) -> list[TensorBoard | WandB]:
    """The sinks that are switched on, for the records of `stage` after step `start`."""
    sinks: list[TensorBoard | WandB] = []
    if config.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard" / stage, start))
    if config.wandb:
        sinks.append(WandB(config.wandb, run_dir, stage))
    return sinks

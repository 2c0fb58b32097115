"""A stage's checkpoints: saved in the background, the newest and some of the older ones kept, restored.

On several hosts, which share the directory, every process makes a Checkpointer and calls each of its methods at the
same point. Process 0 holds the lock, decides and prints; all take the same step, and raise where one of them failed.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSeconds, LatestN

from nanochat_jax.checkpoint import store
from nanochat_jax.checkpoint.store import Damaged
from nanochat_jax.config import CheckpointConfig
from nanochat_jax.errors import UserError
from nanochat_jax.files import claim
from nanochat_jax.mesh import hosts


def warn(text: str) -> None:
    print(text, file=sys.stderr)


class Checkpointer:
    """Checkpoints of one stage under `directory`; `cfg` says which are kept.

    One run at a time may hold a directory: UserError where another one is training there. What a killed process left
    half-written is removed.
    """

    def __init__(
        self,
        directory: str | Path,
        cfg: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (it is frozen)
        say: Callable[[str], None] = warn,
    ):
        self.directory, self._say = Path(directory).absolute(), say
        self._save_seconds = None if cfg.save_minutes is None else 60 * cfg.save_minutes
        self._saved_at = time.monotonic()
        kept = [LatestN(cfg.keep)]
        if cfg.keep_every_hours is not None:  # the first one there is, and then one after every so many hours
            kept.append(EveryNSeconds(interval_secs=3600 * cfg.keep_every_hours))
        self._claim, error = None, None
        if hosts.is_main():
            try:
                self._claim = claim(self.directory / ".lock")
                _drop_unreadable_times(self.directory)
            except (UserError, OSError) as e:
                error = e if isinstance(e, UserError) else self._failed(e)
        store.agree(error)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(kept), cleanup_tmp_directories=True
            ),
            item_handlers=store.handlers(),
        )

    def due(self) -> bool:
        """Whether `save_minutes` have passed since the last save.

        Process 0's clock decides, and elsewhere it is False: let preemption.Stop.agreed tell the others.
        """
        spent = time.monotonic() - self._saved_at
        return self._save_seconds is not None and spent >= self._save_seconds and hosts.is_main()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Copies `state` (a pytree of arrays) and `meta` (plain JSON) to the host, then writes in the background.

        The caller may donate the state's buffers as soon as this returns. An existing step is left as it is. UserError
        where the save before this one failed.
        """
        self.wait()
        self._saved_at = time.monotonic()
        if hosts.gather("save", step in saved_steps(self.directory))[0]:
            return
        args = store.to_save(state, meta)
        try:
            begun = self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(e) from e
        if not begun:
            raise ValueError(f"step {step} comes before the newest checkpoint of {self.directory}")

    def latest(self) -> int | None:
        return hosts.gather("latest", max(saved_steps(self.directory), default=None))[0]

    def restore(self, abstract_state: Any) -> tuple[Any, dict]:
        """(state, meta) of the newest checkpoint that can be read.

        abstract_state: the state's pytree of jax.ShapeDtypeStruct; each array comes back bit for bit, with the
        sharding asked for there, whatever mesh it was saved from. A damaged checkpoint is reported in one line,
        renamed to `<step>.damaged`, and the one before it taken. UserError where none is left, or the shapes differ.
        """
        self.wait()
        state, meta, _, damaged = newest_readable(self.directory, abstract_state, self._say)
        if damaged:
            with hosts.main_first("damaged ones set aside"):
                for bad in damaged if hosts.is_main() else ():
                    aside = self.directory / f"{bad}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.directory / str(bad)).rename(aside)
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
            f"a checkpoint could not be written to {self.directory} ({store.one_line(e)}); make room there, or make it "
            "writable, and the same command resumes from the checkpoint before"
        )

    def close(self) -> None:
        """Waits for the last save and releases the directory. UserError where the save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._claim:
                self._claim.close()


def saved_steps(directory: str | Path) -> list[int]:
    """The steps of the checkpoints that are complete, ascending."""
    directory = Path(directory)
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdecimal() and p.is_dir())


def newest_readable(directory: Path, abstract: Any, say: Callable[[str], None]) -> tuple[Any, dict, int, list[int]]:
    """(state, meta, step, newer steps that are damaged). UserError where there is none."""
    directory = directory.absolute()  # Orbax takes no other paths
    damaged: list[int] = []
    left = saved_steps(directory)
    while (candidate := hosts.gather("candidate", left.pop() if left else None)[0]) is not None:
        try:
            return *store.read(directory / str(candidate), abstract), candidate, damaged
        except Damaged as e:
            if hosts.is_main():
                say(f"checkpoint {candidate} in {directory} is damaged and left out: {e}")
            damaged.append(candidate)
    if damaged:
        raise UserError(
            f"no checkpoint in {directory} can be read; put a whole one there, or rename that folder to train the "
            "stage anew"
        )
    raise UserError(f"{directory} holds no checkpoint yet")


def _drop_unreadable_times(directory: Path) -> None:
    """Removes Orbax's own metadata of a step where it is damaged: Orbax would refuse the whole directory.

    It says only when the checkpoint was made; without it Orbax takes the folder's own time.
    """
    for step in saved_steps(directory):
        note = directory / str(step) / "_CHECKPOINT_METADATA"
        try:
            json.loads(note.read_bytes())  # first, for Orbax prints what it cannot parse
            ocp.path.step.Metadata(step, note.parent).commit_timestamp  # noqa: B018 (raises)
        except FileNotFoundError:
            pass
        except Exception:
            note.unlink()

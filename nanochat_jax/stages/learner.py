"""The updates that a step of RL makes of its samples: what `policy` weighs, through the train step of all stages."""

import functools

import jax
import numpy as np

from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.stages import policy
from nanochat_jax.stages.rollouts import minibatches
from nanochat_jax.stages.run import Run
from nanochat_jax.stages.step import abstract_state, fit_step, place
from nanochat_jax.training import loop


def rows_per_device(run: Run) -> int:
    """Sequences of a minibatch on each data-parallel device. UserError where they cannot be shared evenly."""
    cfg, devices = run.config.rl, sharding.data_parallel(run.mesh)
    each, name = (2, "2 answers") if cfg.objective == "dpo" else (cfg.samples, "rl.samples")
    rows = cfg.questions * each // cfg.minibatches
    if rows % devices:
        raise UserError(
            f"rl: {rows} sequences of an update, rl.questions x {name} / rl.minibatches, cannot be shared by "
            f"{devices} data-parallel devices; make them a multiple of {devices}"
        )
    return rows // devices


class Learner:
    """Makes the updates of a step from its samples, and measures them."""

    def __init__(self, run: Run, optimizer, reference: dict | None, held: int):
        """reference: parameters for the KL and DPO, if any; held: bytes on each device beside the train step's."""
        self.run, self.cfg, self.reference = run, run.config.rl, reference
        graph, dtype = graph_of(run.gpt_config, run.training_dtype), run.training_dtype
        self._log_probs = policy.make_log_probs(graph, dtype, run.mesh, self.cfg.temperature)
        self._look = policy.make_look(self._log_probs, on_policy=self.cfg.objective != "dpo")
        self._weigh = policy.make_weigh(self.cfg)

        def step_of(level: str):
            kept = graph_of(run.gpt_config, dtype, level=level)
            return loop.make_step(kept, optimizer, dtype, run.mesh, temperature=self.cfg.temperature)

        state = abstract_state(run, optimizer)
        arrays = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        rows = rows_per_device(run)
        self._step_of = functools.cache(lambda T: fit_step(run, "rl", step_of, state, arrays, (rows, T), held))

    def prepare(self, params: dict, batch: dict) -> tuple[list[dict], dict]:
        """The placed minibatches of a step from the arrays of `training_batch`, each with -log p of now (`old`) and of
        the reference, if any; and the mean entropy and KL."""
        accumulation = self._step_of(batch["tokens"].shape[1]).accumulation
        parts, measured = [], []
        for part in minibatches(batch, self.cfg.minibatches):
            part = place(part, accumulation, self.run.mesh)
            old, reference, metrics = self._look(params, self.reference, part)
            parts.append({**part, "old": old, "reference": reference})
            measured.append(jax.tree.map(float, metrics))
        return parts, _mean(measured)

    def __call__(self, state: loop.TrainState, parts: list[dict]) -> tuple[loop.TrainState, dict]:
        """All updates of a step; its metrics are their means."""
        train, step = self._step_of(parts[0]["tokens"].shape[-1]), int(state.step)
        measured: list[dict] = []
        for part in parts * self.cfg.epochs:
            rows = {k: part[k] for k in ("tokens", "targets")}
            nll = self._log_probs(state.params, *rows.values())[0] if measured else part["old"]
            weights, found = self._weigh(nll, part)
            rows["weights"] = jax.device_put(weights, part["weights"].sharding)
            state, metrics = train.run(state, rows)
            measured.append({**metrics, **found})
        # one step of the loop is all of these updates: a checkpoint never falls between them
        done = jax.device_put(np.int32(step + 1), sharding.replicated(self.run.mesh))
        return state._replace(step=done), _mean(measured)


def _mean(measured: list[dict]) -> dict:
    return {k: sum(m[k] for m in measured) / len(measured) for k in measured[0]}

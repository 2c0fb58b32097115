"""The train step, and the loop that all four stages share.

The step reads as its formula: sum the gradients of a weighted negative log-likelihood over the micro-batches, then let
the optimizer move the parameters. Pretraining, midtraining and SFT differ in where rows come from and which tokens are
targets; RL in that the weights are advantages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import Interrupted
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import cast_matrices, init_params, merge
from nanochat_jax.model.loss import weighted_nll


class TrainState(NamedTuple):
    """All that training carries from step to step, beside the seed: batches and samples are functions of both."""

    params: dict  # nested, float32 masters
    opt_state: Any
    step: jax.Array  # int32 scalar


def init_state(cfg: GPTConfig, optimizer: optax.GradientTransformation, seed: int, mesh, params=None) -> TrainState:
    """A fresh state, sharded over the mesh as it is made; from `params` (copied) where they are given."""

    def fresh(params):
        # a copy: what jit passes through unchanged is the caller's own buffer, and the step donates it
        params = init_params(cfg, seed) if params is None else jax.tree.map(jnp.copy, params)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    shardings = sharding.tree_shardings(jax.eval_shape(fresh, params), mesh)
    return jax.jit(fresh, out_shardings=shardings)(params)


def make_step(graph, optimizer: optax.GradientTransformation, dtype, mesh, join: Callable | None = None) -> Callable:
    """step(state, batch) -> state, metrics; jitted, the state's buffers donated.

    join: (frozen, params) -> the model's parameters, where the state's are a part of them or a change to them; then it
    is step(state, batch, frozen), and frozen, in `dtype`, is neither donated nor differentiated. None: params are all.

    batch: tokens and targets (A, R, T) int32, A micro-batches of R rows, targets negative where there is none; weights
    (A, R, T) float32, or absent for the mean over all targets. metrics: loss and grad_norm, float32 scalars.
    """

    def micro_loss(params, frozen, tokens, targets, weights):
        params = join(frozen, params) if join else params
        model = merge(graph, params)
        head = params["lm_head"]["weight"]
        hidden = model.hidden(tokens)
        with jax.named_scope("loss"):
            return weighted_nll(
                hidden,
                head,
                targets,
                weights,
                vocab=model.cfg.vocab_size,
                softcap=model.cfg.softcap,
                eight_bits=model.lm_head.eight_bits,
            )

    def micro(params, frozen, *rows):
        found = jax.value_and_grad(micro_loss)(params, frozen, *rows)
        return jax.tree.map(lambda a: a.astype(jnp.float32), found)

    def sum_over_micro_batches(params, frozen, *batch):
        if batch[0].shape[0] == 1:
            return micro(params, frozen, *(x[0] for x in batch))
        zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        return jax.lax.scan(
            lambda total, rows: (jax.tree.map(jnp.add, total, micro(params, frozen, *rows)), None), zeros, batch
        )[0]

    def step(state: TrainState, batch: dict, frozen: dict | None = None) -> tuple[TrainState, dict]:
        tokens, targets = batch["tokens"], batch["targets"]
        weights = batch.get("weights")
        if weights is None:
            is_target = (targets >= 0).astype(jnp.float32)
            weights = is_target / jnp.maximum(is_target.sum(), 1.0)
        params = cast_matrices(state.params, dtype)
        summed = sharding.over_rows(sum_over_micro_batches, mesh)
        loss, grads = summed(params, frozen or {}, tokens, targets, weights)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = sharding.constrain(
                updates, mesh, sharding.state_spec
            )  # made where the moments are, then gathered
            new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        new = jax.lax.with_sharding_constraint(new, sharding.tree_shardings(new, mesh))
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0)


@dataclass(frozen=True)
class Accounting:
    """What a step is worth, for the throughput figures."""

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None  # of all devices together; None on an unknown device, whose MFU is n/a

    def rates(self, steps: int, seconds: float) -> dict:
        """tokens/s and MFU (a share, or None) of `steps` steps."""
        rate = steps * self.tokens_per_step / max(seconds, 1e-9)
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
        }


def fit(
    state: TrainState,
    *,
    step_fn: Callable,
    next_batch: Callable[[int, dict], tuple[dict, dict]],
    steps: int,
    save_every: int,
    checkpointer,
    tracker,
    accounting: Accounting,
    meta: dict,
    stop,
    evaluate: Callable[[int, dict], dict] | None = None,
    eval_every: int = 0,
) -> tuple[TrainState, dict]:
    """Trains from state.step to `steps`, and returns the state and the last metrics.

    next_batch(step, params) gives a batch and metrics about it; evaluate(step, params) gives metrics. Both must depend
    on their arguments alone, so that a run that was killed goes on bit for bit. Metrics are read one step late: the
    device never waits for the console. `meta` goes into every checkpoint, with the seconds spent so far. Raises
    Interrupted, after saving, when the hosts have agreed to stop.
    """
    last: dict = dict(meta.get("last", {}))
    seconds_before, began = meta.get("seconds", 0.0), time.perf_counter()
    pending: tuple[int, dict, dict] | None = None
    mark = time.perf_counter()

    def flush():
        nonlocal pending, mark
        if pending is None:
            return
        step, arrays, extra = pending
        values = {k: float(v) for k, v in jax.device_get(arrays).items()}
        if not math.isfinite(values["loss"]):
            tracker.record(step, **values)
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step}, which was not saved: the same command goes on from the "
                "last checkpoint; if that ends here too, begin the stage anew with lower rates (optim.lr_scale)"
            )
        now = time.perf_counter()
        rates, mark = accounting.rates(1, now - mark), now
        last.update(values, **extra)
        tracker.record(step, **values, **extra, **rates)
        pending = None

    def assess(step, params):
        nonlocal mark
        flush()
        paused = time.perf_counter()
        values = evaluate(step, params)
        mark += time.perf_counter() - paused
        last.update(values)
        tracker.record(step, **values)

    def save(step, state):
        nonlocal mark
        flush()
        paused = time.perf_counter()
        spent = seconds_before + paused - began
        checkpointer.save(step, state, {**meta, "step": step, "seconds": spent, "last": dict(last)})
        mark += time.perf_counter() - paused

    for step in range(int(state.step), steps):
        if evaluate and eval_every and step % eval_every == 0:
            assess(step, state.params)
        batch, extra = next_batch(step, state.params)
        state, arrays = step_fn(state, batch)
        flush()
        pending = (step + 1, arrays, extra)
        stopping, due = stop.agreed(checkpointer.due())
        if step + 1 == steps or (step + 1) % save_every == 0 or due or stopping:
            save(step + 1, state)
            if stopping and step + 1 < steps:
                checkpointer.wait()
                raise Interrupted(
                    f"{stop.why}: stopped and saved at step {step + 1} of {steps}; the same command goes on from there"
                )
    if evaluate:
        assess(steps, state.params)
    checkpointer.wait()
    return state, {**last, "seconds": seconds_before + time.perf_counter() - began}

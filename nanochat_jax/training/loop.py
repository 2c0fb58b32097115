"""The train step, and the loop that all four stages share.

The step sums the gradients of a weighted negative log-likelihood over the micro-batches, then the optimizer updates the
parameters. Pretraining, midtraining and SFT differ in the rows and in which tokens are targets; in RL the weights are
advantages.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.config import GPTConfig
from nanochat_jax.errors import Interrupted
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import cast_matrices, init_params, merge
from nanochat_jax.model.loss import tempered, weighted_nll

# ----------------------------------------------------------------------------------------------------- the step


class TrainState(NamedTuple):
    """All that training carries from step to step; batches and samples depend on the step and the seed alone."""

    params: dict  # nested, float32 masters
    opt_state: Any
    step: jax.Array  # int32 scalar


def init_state(cfg: GPTConfig, optimizer: optax.GradientTransformation, seed: int, mesh, params=None) -> TrainState:
    """A fresh state, sharded over the mesh as it is made; from a copy of `params` where they are given."""

    def fresh(params):
        # a copy: what jit passes through unchanged is the caller's own buffer, and the step donates it
        params = init_params(cfg, seed) if params is None else jax.tree.map(jnp.copy, params)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    shardings = sharding.tree_shardings(jax.eval_shape(fresh, params), mesh)
    return jax.jit(fresh, out_shardings=shardings)(params)


def make_step(
    graph,
    optimizer: optax.GradientTransformation,
    dtype,
    mesh,
    join: Callable | None = None,
    temperature: float = 1.0,
    draw: Callable | None = None,
) -> Callable:
    """step(state, batch) -> state, metrics; jitted, the state's buffers donated.

    join: (frozen, params) -> the model's parameters, where the state has only a part of them or a change to them, such
    as adapters; then it is step(state, batch, frozen), and frozen, in `dtype`, is neither donated nor differentiated.
    temperature: of the softmax whose log-likelihood is the loss. draw: targets (A, R, T) -> `loss.Sample`, entries that
    stand for the vocabulary in the loss of the whole batch, whatever its micro-batches.

    batch: tokens and targets (A, R, T) int32, A micro-batches of R rows, targets negative where there is none; weights
    (A, R, T) float32, or absent for the mean over all targets. metrics: loss and grad_norm, float32 scalars.
    """

    def micro_loss(params, given, tokens, targets, weights):
        frozen, drawn = given
        params = join(frozen, params) if join else params
        model, head = merge(graph, params), params["lm_head"]["weight"]
        hidden, softcap = tempered(model.hidden(tokens), model.cfg.softcap, temperature)
        more = {"softcap": softcap, "eight_bits": model.lm_head.eight_bits, "drawn": drawn}
        return weighted_nll(hidden, head, targets, weights, vocab=model.cfg.vocab_size, **more)

    def micro(params, given, *rows):
        found = jax.value_and_grad(micro_loss)(params, given, *rows)
        return jax.tree.map(lambda a: a.astype(jnp.float32), found)

    def sum_over_micro_batches(params, given, *batch):
        def add(total, rows):
            return jax.tree.map(jnp.add, total, micro(params, given, *rows)), None

        if batch[0].shape[0] == 1:
            return micro(params, given, *(x[0] for x in batch))
        several = sharding.data_parallel(mesh) > 1
        zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        total, _ = jax.lax.scan(add, zeros, tuple(x[:-1] if several else x for x in batch))
        if several:
            # The last stands behind the loop: gradients cross the links while its backward pass goes on. Without the
            # barrier it would begin before the loop, which hides the gathers too, for more memory (15 % at d24).
            total, last = jax.lax.optimization_barrier((total, tuple(x[-1] for x in batch)))
            total, _ = add(total, last)
        return total

    def step(state: TrainState, batch: dict, frozen: dict | None = None) -> tuple[TrainState, dict]:
        tokens, targets, weights = batch["tokens"], batch["targets"], batch.get("weights")
        if weights is None:
            is_target = (targets >= 0).astype(jnp.float32)
            weights = is_target / jnp.maximum(is_target.sum(), 1.0)
        params = cast_matrices(state.params, dtype)
        given = frozen or {}, draw(targets) if draw else None
        loss, grads = sharding.over_rows(sum_over_micro_batches, mesh)(params, given, tokens, targets, weights)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = sharding.constrain(updates, mesh, sharding.state_spec)  # computed where the moments are
            new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        new = jax.lax.with_sharding_constraint(new, sharding.tree_shardings(new, mesh))
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0)


# ----------------------------------------------------------------------------------------------------- the loop


def rates(tokens: int, flops_per_token: float, peak_flops: float, seconds: float) -> dict:
    """tokens/s and MFU of a step. peak_flops: of all devices together; 0 where it is unknown, and MFU then None."""
    rate = tokens / max(seconds, 1e-9)
    return {"tokens_per_second": rate, "mfu": rate * flops_per_token / peak_flops if peak_flops else None}


def fit(
    state: TrainState,
    *,
    step_fn: Callable,
    next_batch: Callable[[int, dict], tuple[Any, dict]],
    steps: int,
    save_every: int,
    checkpointer,
    tracker,
    rates: Callable[[float], dict],
    meta: dict,
    stop,
    evaluate: Callable[[int, dict], dict] | None = None,
    eval_every: int = 0,
) -> tuple[TrainState, dict]:
    """Trains from state.step to `steps`, and returns the state and the last metrics.

    next_batch(step, params) gives a batch and metrics about it; evaluate(step, params) gives metrics. Both must depend
    on their arguments alone, so that a run that was killed resumes bit for bit. rates(seconds) gives a step's speed.
    Metrics are read one step late: the device never waits for the console. `meta` goes into every checkpoint, with the
    seconds spent so far. Raises Interrupted, after saving, when the hosts have agreed to stop.
    """
    last: dict = dict(meta.get("last", {}))
    began = time.perf_counter() - meta.get("seconds", 0.0)  # as if the seconds before a resume were of this process
    pending: tuple[int, dict, dict] | None = None
    mark = time.perf_counter()  # the end of the last step, moved on by what does not count as training

    @contextlib.contextmanager
    def clock_stopped():
        nonlocal mark
        paused = time.perf_counter()
        yield
        mark += time.perf_counter() - paused

    def flush():
        nonlocal pending, mark
        if pending is None:
            return
        (step, arrays, extra), pending = pending, None
        values = {k: float(v) for k, v in jax.device_get(arrays).items()}
        if not math.isfinite(values["loss"]):
            tracker.record(step, **values)
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step}, which was not saved: the same command resumes from the "
                "last checkpoint; if that ends here too, begin the stage anew with lower rates (optim.lr_scale)"
            )
        speed, mark = rates(time.perf_counter() - mark), time.perf_counter()
        last.update(values, **extra)
        tracker.record(step, **values, **extra, **speed)

    def assess(step, params):
        flush()
        with clock_stopped():
            values = evaluate(step, params)
        last.update(values)
        tracker.record(step, **values)

    def save(step, state):
        flush()
        with clock_stopped():
            seconds = time.perf_counter() - began
            checkpointer.save(step, state, {**meta, "step": step, "seconds": seconds, "last": dict(last)})

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
                    f"{stop.why}: stopped and saved at step {step + 1} of {steps}; the same command resumes from there"
                )
    if evaluate:
        assess(steps, state.params)
    checkpointer.wait()
    return state, {**last, "seconds": time.perf_counter() - began}

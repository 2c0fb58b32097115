"""Optimizers around another one, which use where the weights have been: a mean of the last ones, and a look ahead.

Both hold one more copy of the parameters, in float32, and are pure functions of the step: they resume as any other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

MEMORIES = 30  # of `lookahead`: moving averages in all steps


class AverageState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # as in optim.AdamState
    inner: optax.OptState
    mean: optax.Updates


def averaged(inner: optax.GradientTransformation, steps: int, share: float) -> optax.GradientTransformation:
    """The last of `steps` steps ends at the mean of the weights after each of the last share * steps (Polyak and
    Juditsky 1992; over a cooldown, LAWA: arXiv 2209.14981)."""
    last = max(1, round(share * steps))

    def init(params):
        return AverageState(jnp.zeros((), jnp.int32), inner.init(params), optax.tree.zeros_like(params, jnp.float32))

    def update(grads, state, params):
        updates, inside = inner.update(grads, state.inner, params)
        n = state.count - (steps - last) + 1  # weights in the mean, where positive
        weight = jnp.where(n > 0, 1 / jnp.maximum(n, 1), 0.0)
        mean = jax.tree.map(lambda m, p, u: m + weight * (p + u - m), state.mean, params, updates)
        at_end = state.count == steps - 1
        updates = jax.tree.map(lambda u, m, p: jnp.where(at_end, m - p, u), updates, mean, params)
        return updates, AverageState(state.count + 1, inside, mean)

    return optax.GradientTransformation(init, update)


class LookaheadState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]
    inner: optax.OptState
    drift: optax.Updates  # a moving average of steps


def lookahead(
    inner: optax.GradientTransformation, strength: float, lr: Callable[[jax.Array], jax.Array], steps: int
) -> optax.GradientTransformation:
    """EMA-Nesterov (arXiv 2605.25395): gradients are taken ahead of where the weights are, by `strength * lr(step)`
    times a moving average of the steps over a thirtieth of all.

    The parameters that training holds are those ahead. In the first sixth of the steps and in the last quarter they
    are the weights themselves.
    """
    keep = max(0.0, 1 - MEMORIES / steps)

    def ahead(step):
        return jnp.where((step >= steps / 6) & (step < 0.75 * steps), strength * lr(step), 0.0)

    def init(params):
        return LookaheadState(jnp.zeros((), jnp.int32), inner.init(params), optax.tree.zeros_like(params, jnp.float32))

    def update(grads, state, params):
        updates, inside = inner.update(grads, state.inner, params)
        now, after = ahead(state.count), ahead(state.count + 1)
        # weights go from `now * drift` behind the parameters to the parameters and their update
        drift = jax.tree.map(lambda d, u: keep * d + (1 - keep) * (u + now * d), state.drift, updates)
        updates = jax.tree.map(lambda u, d: u + after * d, updates, drift)
        return updates, LookaheadState(state.count + 1, inside, drift)

    return optax.GradientTransformation(init, update)

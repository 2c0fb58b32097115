"""Optimizers around another one, against their definitions written out step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.config import MeshConfig, load_config
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.planning.step import TrainStep
from nanochat_jax.training import averages, optim

STEPS, RATE = 40, 0.1


def descend(optimizer) -> list[np.ndarray]:
    """The parameters that training holds, before every step and at the end, on a curved valley."""
    p, out = {"w": jnp.asarray([2.0, -1.5])}, []
    state = optimizer.init(p)
    for _ in range(STEPS):
        out.append(np.asarray(p["w"]))
        updates, state = optimizer.update(jax.grad(valley)(p), state, p)
        p = optax.apply_updates(p, updates)
    return [*out, np.asarray(p["w"])]


def valley(p):
    return (p["w"] ** 2 * jnp.asarray([0.5, 2.0])).sum() + p["w"].prod()


@pytest.mark.parametrize("share, last", [(0.25, 10), (0.001, 1), (1.0, 40)])
def test_the_mean_of_the_last_weights(share, last):
    plain = descend(optax.sgd(RATE))
    found = descend(averages.averaged(optax.sgd(RATE), STEPS, share))
    np.testing.assert_array_equal(found[:-1], plain[:-1])
    np.testing.assert_allclose(found[-1], np.mean(plain[-last:], axis=0), rtol=1e-5)


def test_lookahead():
    """x' = y - rate grad(y) with y = x + strength * drift; drift' = keep drift + (1 - keep) (x' - x)."""
    keep, gradient = 1 - averages.MEMORIES / STEPS, jax.grad(valley)
    x, drift = np.asarray([2.0, -1.5]), np.zeros(2)
    found = descend(averages.lookahead(optax.sgd(RATE), 0.6, lambda step: 1.0, STEPS))
    for step in range(STEPS):
        strength = 0.6 if STEPS / 6 <= step < 0.75 * STEPS else 0.0
        y = x + strength * drift
        np.testing.assert_allclose(found[step], y, rtol=1e-4, atol=1e-5)
        after = y - RATE * np.asarray(gradient({"w": jnp.asarray(y)})["w"])
        x, drift = after, keep * drift + (1 - keep) * (after - x)
    np.testing.assert_allclose(found[-1], x, rtol=1e-4, atol=1e-5)


def test_an_update_is_no_smaller_than_its_floor():
    schedules = optim.Schedules(*(lambda s, v=v: jnp.float32(v) for v in (1.0, 0.9, 0.0)))
    small, large = (scale * jax.random.normal(jax.random.key(0), (6, 4)) for scale in (0.01, 100.0))
    p, g = {"small": small, "large": large}, {"small": small, "large": large}
    plain, floored = (optim.muon(0.1, schedules, jnp.float32, "modern", floor=f) for f in (0.0, 0.35))
    (a, _), (b, _) = (o.update(g, o.init(p), p) for o in (plain, floored))
    np.testing.assert_allclose(a["small"], b["small"], rtol=1e-6)
    rate = 0.1 * np.sqrt(1.5)
    assert float(jnp.linalg.norm(b["large"])) == pytest.approx(rate * 0.35 * float(jnp.linalg.norm(large)), rel=1e-5)
    assert float(jnp.linalg.norm(a["large"])) < float(jnp.linalg.norm(b["large"])) / 10


def test_what_is_for_muon_alone_needs_muon():
    for setting in ("update_floor=0.3", "momentum_steps=60"):
        with pytest.raises(UserError, match="they are Muon's"):
            load_config(None, overrides=["mid.optim.matrices=adamw", f"mid.optim.{setting}"])


@pytest.mark.parametrize(
    "settings", [["average=0.2"], ["lookahead=0.6"], ["matrices=adamw"], ["update_floor=9"], ["momentum_steps=1"]]
)
def test_settings_reach_the_optimizer(settings):
    """Two steps of a tiny model: each setting changes the state or the update."""
    tiny = ["model.depth=2", "model.width=32", "model.head_dim=16", "model.sequence_len=32", "tokenizer.vocab_size=600"]
    tiny += ["base.batch_tokens=64", "base.tokens=640"]

    def after(more):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        step = TrainStep(load_config(None, overrides=[*tiny, *(f"base.optim.{s}" for s in more)]), mesh)
        state, run = step.init(), step.jitted()
        batch = np.arange(64, dtype=np.int32).reshape(1, 2, 32)
        for _ in range(2):
            state, _ = run(state, {"tokens": batch, "targets": batch})
        return state

    plain, changed = after([]), after(settings)
    # at first the projections are zero, and so are the gradients of what they read
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(changed.params))
    same_state = jax.tree.structure(plain.opt_state) == jax.tree.structure(changed.opt_state)
    same_weights = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), plain.params, changed.params)))
    assert not (same_state and same_weights)

"""The optimizer against the reference's three steps, and its parts against their definitions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import relative_error
from nanochat_jax.config import MeshConfig, OptimConfig, load_config
from nanochat_jax.mesh import sharding
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.planning.step import TrainStep
from nanochat_jax.training import loop, optim
from nanochat_jax.weights.names import from_reference, to_reference


def test_golden_three_steps(golden_modern):
    """Losses and every parameter after three steps at the stored rates, momenta and decays."""
    from flax import nnx

    a, cfg = golden_modern.arrays, golden_modern.cfg
    hyper = jnp.asarray(a["step_hyper_lrm_momentum_wd"])
    schedules = optim.Schedules(*(lambda step, i=i: hyper[step, i] for i in range(3)))
    optimizer = optim.make_optimizer(cfg, OptimConfig(), schedules, batch_tokens=2**19)
    params = nnx.to_pure_dict(nnx.split(golden_modern.model())[1])
    state = loop.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    step = loop.make_step(graph_of(cfg, jnp.float32), optimizer, jnp.float32, mesh)
    batch = {k: jnp.asarray(a[k])[None] for k in ("tokens", "targets")}
    losses = []
    for _ in range(len(hyper)):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, a["losses_during_steps"][: len(losses)], rtol=1e-4)
    got, want = to_reference(state.params, cfg), golden_modern.tensors("w_after")
    assert set(got) == set(want)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-3, name
    assert from_reference(got, state.params, cfg).keys() == state.params.keys()


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_polar_express_orthogonalises(shape):
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    y = optim.orthogonalize(x, optim.POLAR_EXPRESS, 1.01, 1e-6)
    singular = jnp.linalg.svd(y, compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    cosine = jnp.sum(y * (u @ vt), axis=(1, 2)) / jnp.linalg.norm(y, axis=(1, 2)) / jnp.linalg.norm(u @ vt, axis=(1, 2))
    assert cosine.min() > 0.98


def test_cautious_decay_spares_what_the_update_opposes():
    schedules = optim.Schedules(*(lambda s, v=v: jnp.float32(v) for v in (1.0, 0.9, 0.5)))
    with_decay = optim.muon(0.1, schedules, jnp.float32, "modern")
    none = optim.muon(
        0.1, optim.Schedules(schedules.lr, schedules.momentum, lambda s: jnp.float32(0)), jnp.float32, "modern"
    )
    p = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
    g = {"w": jax.random.normal(jax.random.key(1), (6, 4))}
    a, _ = with_decay.update(g, with_decay.init(p), p)
    b, _ = none.update(g, none.init(p), p)
    agrees = -b["w"] * p["w"] >= 0
    expected = jnp.where(agrees, b["w"] - 0.1 * np.sqrt(1.5) * 0.5 * p["w"], b["w"])
    np.testing.assert_allclose(a["w"], expected, rtol=1e-5, atol=1e-7)


def test_adamw_equals_optax_without_decay():
    ours = optim.adamw(0.01, (0.8, 0.95), 0.0, lambda s: jnp.float32(1))
    theirs = optax.adam(0.01, b1=0.8, b2=0.95, eps=optim.EPS)
    p = {"w": jax.random.normal(jax.random.key(0), (5, 3))}
    a, b = ours.init(p), theirs.init(p)
    for i in range(4):
        g = {"w": jax.random.normal(jax.random.key(i), (5, 3))}
        x, a = ours.update(g, a, p)
        y, b = theirs.update(g, b, p)
        np.testing.assert_allclose(x["w"], y["w"], rtol=1e-5)


def test_schedules_at_their_corners():
    s = optim.make_schedules(OptimConfig(), 1000, 0.2, "modern")
    assert float(s.lr(0)) == pytest.approx(1 / 40)
    assert float(s.lr(39)) == float(s.lr(350)) == 1.0
    assert float(s.lr(1000)) == pytest.approx(0.05)
    assert float(s.momentum(0)) == pytest.approx(0.85)
    assert float(s.momentum(1000)) == pytest.approx(0.90)
    assert float(s.weight_decay(0)) == pytest.approx(0.2)
    assert float(s.weight_decay(1000)) == pytest.approx(0.0, abs=1e-6)
    classic = optim.make_schedules(OptimConfig(warmup_steps=0, warmdown=0.2, final_lr=0.0), 1000, 0.0, "classic")
    assert float(classic.lr(0)) == 1.0 and float(classic.lr(1000)) == 0.0
    assert float(classic.momentum(300)) == pytest.approx(0.95)


@pytest.mark.parametrize("setting", ["matrices=adamw", "batch_power=0", "centred_head=true"])
def test_settings_reach_the_optimizer(setting):
    """Two steps of a tiny model: each setting changes the state or the update."""
    tiny = ["model.depth=2", "model.width=32", "model.head_dim=16", "model.sequence_len=32", "tokenizer.vocab_size=600"]
    tiny += ["base.batch_tokens=64", "base.tokens=640"]

    def after(*more):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        step = TrainStep(load_config(None, overrides=[*tiny, *more]), mesh)
        state, run = step.init(), step.jitted()
        batch = np.arange(64, dtype=np.int32).reshape(1, 2, 32)
        for _ in range(2):
            state, _ = run(state, {"tokens": batch, "targets": batch})
        return state

    plain, changed = after(), after(f"base.optim.{setting}")
    # at first the projections are zero, and so are the gradients of what they read
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(changed.params))
    same_state = jax.tree.structure(plain.opt_state) == jax.tree.structure(changed.opt_state)
    same_weights = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), plain.params, changed.params)))
    assert not (same_state and same_weights)


def test_a_centred_head_keeps_its_mean_and_its_padding():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4)).at[6:].set(0)}
    optimizer = optax.chain(optim.adamw(0.1, (0.8, 0.96), 0.01, lambda step: jnp.float32(1)), optim.centred(6))
    state = optimizer.init(params)
    for n in range(3):
        grads = {"w": (0.5 + jax.random.normal(jax.random.key(n), (8, 4))).at[6:].set(0)}
        updates, state = optimizer.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        np.testing.assert_allclose(new["w"][:6].mean(axis=0), params["w"][:6].mean(axis=0), atol=1e-6)
        assert not np.any(new["w"][6:]) and np.abs(new["w"][:6] - params["w"][:6]).max() > 0.01
        params = new


def test_rates_by_the_batch_and_a_decay_that_undoes_it():
    """A run shrinks by the product of rate, decay and steps: that is the same whatever the power and the batch."""
    by = {}
    for power in (0.5, 0):
        for batch in (2**14, 2**19):
            settings = ["base.tokens=100_000_000", f"base.batch_tokens={batch}", f"base.optim.batch_power={power}"]
            config = load_config(None, overrides=settings)
            gpt = scaling.gpt_config(config.model, config.tokenizer.vocab_size)
            plan, rate = scaling.base_plan(gpt, config), optim.rates(gpt, config.base.optim, batch)["muon"]
            by[power, batch] = rate, rate * plan.weight_decay * plan.steps
    assert by[0.5, 2**14][0] == pytest.approx(0.02 / math.sqrt(32)) and by[0, 2**14][0] == pytest.approx(0.02)
    assert [shrinks for _, shrinks in by.values()] == pytest.approx([by[0.5, 2**19][1]] * 4, rel=0.01)


def test_a_light_state_has_fewer_bytes_and_the_same_updates_where_it_can():
    """A second moment of rank one is the product of its means; first moments differ by what bfloat16 rounds."""
    rows, columns = jnp.abs(jax.random.normal(jax.random.key(0), (24, 1))), jnp.linspace(0.5, 2.0, 8)[None]
    signs = jnp.sign(jax.random.normal(jax.random.key(1), (3, 24, 8)))
    params, found = {"w": jnp.zeros((24, 8)), "s": jnp.zeros(3)}, []
    for light in (False, True):
        optimizer = optim.adamw(0.1, (0.8, 0.96), 0.0, lambda step: jnp.float32(1), light)
        state = optimizer.init(params)
        for sign in signs:
            updates, state = optimizer.update({"w": sign * jnp.sqrt(rows * columns), "s": jnp.ones(3)}, state, params)
        found.append(updates)
        bytes_of = sum(x.nbytes for x in jax.tree.leaves((state.m["w"], state.v["w"])))
        assert bytes_of == (24 * 8 * 2 + (24 + 8) * 4 if light else 24 * 8 * 8)
    np.testing.assert_allclose(found[1]["w"], found[0]["w"], atol=0.1 * 2**-7)
    np.testing.assert_array_equal(found[1]["s"], found[0]["s"])  # a vector's state is float32


@pytest.mark.parametrize("scale", [1e-3, 1e-8])
def test_rows_without_a_gradient_stay_where_the_state_is_light(scale):
    optimizer = optim.adamw(0.1, (0.8, 0.96), 0.0, lambda step: jnp.float32(1), light=True)
    params = {"w": jnp.ones((4, 8))}
    grads = {"w": jnp.zeros((4, 8)).at[1].set(scale)}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"][1], -0.1, rtol=0.02)
    assert not np.any(updates["w"][jnp.array([0, 2, 3])])
    none, _ = optimizer.update({"w": jnp.zeros((4, 8))}, optimizer.init(params), params)
    assert not np.any(none["w"])


def test_a_light_state_is_split_over_devices_and_trains_alike():
    config = load_config(None, None, ["model.depth=2", "model.sequence_len=64", "tokenizer.vocab_size=512"])
    losses = {}
    for light, count in ((False, 1), (True, 1), (True, 8)):
        config = dataclasses.replace(config, optimizer_state="light" if light else "float32", dtype="float32")
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:count])
        made = TrainStep(config, mesh, steps=40)
        step, state = made.jitted(), made.init()
        losses[light, count] = []
        for n in range(8):
            tokens = np.random.default_rng(n).integers(0, 64, (1, 8, 65), np.int32)
            batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:]}
            state, metrics = step(state, jax.device_put(batch, sharding.rows(mesh, leading=1)))
            losses[light, count].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[True, 8], losses[True, 1], rtol=1e-5)
    np.testing.assert_allclose(losses[True, 1], losses[False, 1], rtol=1e-3)
    assert losses[True, 1] != losses[False, 1]

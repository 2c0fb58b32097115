"""What a step computes again changes neither its loss nor its gradients, and needs the products that are said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import MeshConfig, load_config
from nanochat_jax.mesh import sharding
from nanochat_jax.model import remat
from nanochat_jax.model.gpt import graph_of, init_params, merge
from nanochat_jax.model.loss import weighted_nll
from nanochat_jax.model.scaling import gpt_config
from nanochat_jax.planning.step import TrainStep, recipe

VOCAB = 512


def gradients(level: str, config, seq: int, rows: int = 2):
    """(compiled loss and gradients of random parameters, what they are)"""
    cfg = gpt_config(config.model, VOCAB)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), init_params(cfg, 0))
    tokens = jax.random.randint(jax.random.key(1), (rows, seq), 0, VOCAB)

    def loss(params):
        hidden = merge(graph_of(cfg, jnp.float32, level=level), params).hidden(tokens)
        head = params["lm_head"]["weight"]
        return weighted_nll(hidden, head, tokens, jnp.ones(tokens.shape), vocab=VOCAB, softcap=15.0)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return compiled, compiled(params)


@pytest.mark.parametrize("arch", ["modern", "classic"])
@pytest.mark.parametrize("level", ["block", "full"])
def test_loss_and_gradients_are_the_same(level, arch):
    config = load_config(None, None, ["model.depth=3", f"model.arch={arch}", "model.sequence_len=160"])
    (_, want), (_, got) = gradients("none", config, 160), gradients(level, config, 160)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_the_products_that_are_computed_again():
    config = recipe(4, 512, VOCAB, precision="float32")
    flops = {n: gradients(n, config, 512)[0].cost_analysis()["flops"] / 1024 for n in remat.LEVELS}
    cfg = gpt_config(config.model, VOCAB)
    again = {level: flops[level] - flops["none"] for level in ("block", "full")}
    assert 0 < again["block"] < again["full"]
    for level, measured in again.items():  # XLA counts additions and exponentials too
        assert remat.again(cfg, level) == pytest.approx(measured, rel=0.3)


def losses_of(level: str, mesh, steps: int, precision: str = "float32") -> list[float]:
    config = recipe(4, 64, VOCAB, precision=precision, batch_tokens=8 * 64)
    made = TrainStep(config, mesh, steps=50)
    step, state, losses = made.jitted(level), made.init(), []
    for n in range(steps):
        tokens = np.random.default_rng(n).integers(0, 64, (1, 8, 65), np.int32)
        batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:]}
        state, metrics = step(state, jax.device_put(batch, sharding.rows(mesh, leading=1)))
        losses.append(float(metrics["loss"]))
    return losses


def test_training_is_the_same():
    """Float32; on eight devices too. Only some steps: training is chaotic, and a last bit is seen later on."""
    one, eight = (sharding.make_mesh(MeshConfig(), jax.devices()[:count]) for count in (1, 8))
    want = losses_of("none", one, 12)
    np.testing.assert_allclose(losses_of("full", one, 12), want, rtol=1e-6)
    np.testing.assert_allclose(losses_of("block", eight, 12), want, rtol=1e-6)


@pytest.mark.parametrize("level", ["block", "full"])
@pytest.mark.parametrize(
    ("split", "precision"), [(MeshConfig(2, 2, 2), "float32"), (MeshConfig(1, 1, 1), "fp8")], ids=["tensor", "fp8"]
)
def test_with_a_mesh_of_three_axes_and_with_eight_bits(level, split, precision):
    mesh = sharding.make_mesh(split, jax.devices()[: 8 if split.tensor > 1 else 1])
    want = losses_of("none", mesh, 3, precision)
    np.testing.assert_allclose(
        losses_of(level, mesh, 3, precision), want, rtol=1e-5 if precision == "float32" else 1e-3
    )

"""The kernels between the products do what the plain formulas do, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import relative_error
from nanochat_jax.kernels import fused, launch
from nanochat_jax.model.gpt import rotary_tables

EPS = 1e-5


def normal(seed: int, *shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def compare(kernel, plain, *args, tolerance=1e-5) -> None:
    """Values of both, and their gradients along a random direction."""
    got, pull = jax.vjp(jax.jit(kernel), *args)
    want, pull_plain = jax.vjp(plain, *args)
    up = [normal(90 + i, *x.shape).astype(x.dtype) for i, x in enumerate(jax.tree.leaves(want))]
    up = jax.tree.unflatten(jax.tree.structure(want), up)
    for a, b in zip(jax.tree.leaves((got, pull(up))), jax.tree.leaves((want, pull_plain(up))), strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("width", [64, 192])  # 128 + 64: in pieces
def test_add_and_norm(width):
    x, change = normal(0, 2, 8, width), normal(1, 2, 8, width)
    compare(lambda *a: fused._add(*a, EPS), lambda *a: fused.add_and_norm(*a, EPS), x, change)


def test_mix_and_norm_hands_on_the_gradient_of_the_first_layer():
    args = *(normal(i, 2, 8, 192) for i in range(3)), jnp.float32(1.1), jnp.float32(0.2)
    compare(lambda *a: fused._mix(*a, EPS), lambda *a: fused.mix_and_norm(*a, EPS), *args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotate_and_norm(dtype):
    x = normal(0, 2, 32, 3, 64).astype(dtype)
    cos, sin = rotary_tables(jnp.arange(32), 64, 1e4)
    compare(
        lambda x: fused._rotate(x, cos[:, 0], sin[:, 0], 1.2, EPS),
        lambda x: fused.rotate_and_norm(x, (cos, sin), 1.2, EPS),
        x,
        tolerance=1e-5 if dtype == "float32" else 8e-3,
    )


def test_relu_squared_knows_its_argument_by_its_result():
    x = jnp.asarray([-1.0, 0.0, 1e-3, 2.0])
    assert np.allclose(jax.vmap(jax.grad(fused.relu_squared))(x), [0.0, 0.0, 2e-3, 4.0], rtol=1e-6)


def test_kernels_are_for_a_gpu_and_for_what_no_partitioner_cuts(monkeypatch):
    x, seen = jnp.ones((4, 64)), []
    monkeypatch.setattr(launch.devices, "platform", lambda: "gpu")

    def asked(manual):
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        spec = jax.P(None)

        def look(x):
            seen.append(launch.by_kernels(x))
            return x

        shape = {"mesh": mesh, "in_specs": spec, "out_specs": spec, "axis_names": manual, "check_vma": False}
        jax.jit(jax.shard_map(look, **shape))(x)

    asked({"data", "tensor"})
    asked({"data"})
    assert seen == [True, False] and not launch.by_kernels(x)

"""A table's gradient, added up by id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import relative_error
from nanochat_jax.kernels import segments


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [64, 192])
def test_the_kernel_adds_what_atomics_would(weighted, width):
    rng = np.random.default_rng(0)
    total = jnp.asarray(rng.normal(size=(40, width)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(96, width)), jnp.float32)
    ids = jnp.asarray(np.where(rng.random(96) < 0.5, 7, rng.integers(0, 40, 96)), jnp.int32)  # one is frequent
    weights = jnp.asarray(rng.normal(size=96), jnp.float32) if weighted else None
    got = jax.jit(segments._add_rows)(total, rows, ids, weights)
    assert relative_error(got, segments.add_rows(total, rows, ids, weights)) < 1e-6
    alone = segments._add_rows(None, rows, ids, weights, of=40)
    assert relative_error(alone, segments.add_rows(jnp.zeros_like(total), rows, ids, weights)) < 1e-6


def test_gradient_of_a_look_up():
    table, ids = jnp.ones((5, 3)), jnp.asarray([[1, 1], [4, 0]])
    grad = jax.grad(lambda t: (segments.look_up(t, ids) * jnp.arange(12.0).reshape(2, 2, 3)).sum())(table)
    assert np.allclose(grad, jax.grad(lambda t: (t[ids] * jnp.arange(12.0).reshape(2, 2, 3)).sum())(table))

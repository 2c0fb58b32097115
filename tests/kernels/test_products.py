"""Products in every form that a device takes them in, against the plain one; and in which type training runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import relative_error
from nanochat_jax import devices
from nanochat_jax.kernels import products


@pytest.mark.parametrize("rows", [1, 5, products.TURNED_ROWS + 1, 2 * products.RUN + 3])
@pytest.mark.parametrize("out, inner", [(48, 16), (16, 48)])
@pytest.mark.parametrize("dtype, allowed", [("float32", 1e-5), ("bfloat16", 0.006)])
def test_product_and_its_gradients(rows, out, inner, dtype, allowed):
    x, weight, dy = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(1, rows, inner), (out, inner), (1, rows, out)])
    )

    def all_three(product, *args):
        y, pull = jax.vjp(product, *args[:2])
        return y, *pull(args[2].astype(y.dtype))

    want = all_three(lambda x, w: jnp.einsum("...i,oi->...o", x, w), x, weight, dy)
    got = jax.jit(lambda *args: all_three(products.product, *args))(*(a.astype(dtype) for a in (x, weight, dy)))
    for found, right in zip(got, want):
        assert found.dtype == dtype and found.shape == right.shape
        assert relative_error(found.astype(jnp.float32), right) < allowed


def test_sixteen_bit_operands_are_not_converted_on_a_cpu():
    """XLA converts both operands of a product whose result is to have 16 bits, and multiplies in float32."""
    x, weight = jnp.zeros((products.RUN * 2, 64), jnp.bfloat16), jnp.zeros((128, 64), jnp.bfloat16)
    program = jax.jit(jax.grad(lambda x, w: products.product(x, w).astype(jnp.float32).sum(), (0, 1)))
    dots = [line for line in program.lower(x, weight).as_text().splitlines() if "dot_general" in line]
    assert len(dots) >= 3  # the input's gradient, and two runs of the weight's
    for line in dots:
        operands, result = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16") == 2 and "f32" in result


@pytest.mark.parametrize("m, n", [(8, 24), (24, 8)])
def test_matmul_of_several(m, n):
    a, b = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in ((3, m, n), (3, n, m)))
    np.testing.assert_allclose(products.matmul(a, b), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has, want", [(True, "bfloat16"), (False, "float32")])
def test_training_takes_bfloat16_where_the_cores_have_it(monkeypatch, has, want):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: has)
    assert devices.training_dtype("auto") == want
    assert devices.compute_dtype("auto") == "float32"  # what is evaluated and sampled
    assert devices.training_dtype("float32") == "float32"

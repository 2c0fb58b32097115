"""8-bit products: how near they are, what they keep, and that scales follow the tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import GPTConfig, MeshConfig, OptimConfig
from nanochat_jax.kernels import fp8
from nanochat_jax.mesh import sharding
from nanochat_jax.model import loss
from nanochat_jax.model.gpt import graph_of
from nanochat_jax.training import loop, optim


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def product(x, weight):
    return fp8.products(x, (weight,))[0]


def off(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("dtype, close", [(fp8.E4M3, 2**-4), (fp8.E5M2, 2**-3)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_quantised_is_near_whatever_the_size(dtype, close, size):
    x = size * normal(0, 64, 64)
    q = fp8.quantize(x, dtype)
    assert q.values.dtype == dtype and float(jnp.abs(q.values.astype(jnp.float32)).max()) == float(jnp.finfo(dtype).max)
    back = q.values.astype(jnp.float32) * q.scale
    assert off(back, x) < close / 2
    large = jnp.abs(x) > 1e-2 * jnp.abs(x).max()  # below come the subnormals
    assert float(jnp.where(large, jnp.abs(back / x - 1), 0).max()) <= close


def test_zeros_stay_zeros():
    x = jnp.zeros((32, 128))
    y, back = jax.vjp(product, x, normal(0, 128, 128))
    assert not np.any(y) and not any(np.isnan(g).any() for g in back(jnp.ones_like(y)))


def test_product_and_gradients_are_near_those_of_float32():
    x, w, dy = normal(0, 2, 32, 128), normal(1, 256, 128), normal(2, 2, 32, 256)
    y, back = jax.vjp(product, x, w)
    want, exact = jax.vjp(lambda x, w: x @ w.T, x, w)
    assert 1e-3 < off(y, want) < 0.04  # 3 bits of fraction: about 2^-5 a factor
    for got, grad in zip(back(dy), exact(dy)):
        assert got.shape == grad.shape and got.dtype == grad.dtype
        assert 1e-3 < off(got, grad) < 0.08


def test_equals_the_products_of_what_was_rounded():
    x, w, dy = normal(0, 32, 128), normal(1, 256, 128), normal(2, 32, 256)
    x8, w8, dy8 = (
        q.values.astype(jnp.float32) * q.scale for q in map(fp8.quantize, (x, w, dy), (fp8.E4M3, fp8.E4M3, fp8.E5M2))
    )
    y, back = jax.vjp(product, x, w)
    dx, dw = back(dy)
    for got, want in ((y, x8 @ w8.T), (dx, dy8 @ w8), (dw, dy8.T @ x8)):
        assert off(got, want) < 1e-5


def test_eight_bits_are_kept_for_the_backward_pass():
    x, w = normal(0, 32, 128).astype(jnp.bfloat16), normal(1, 128, 128).astype(jnp.bfloat16)
    kept = jax.eval_shape(lambda x, w: jax.vjp(product, x, w)[1], x, w)
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(kept)]
    assert sum(sizes) <= x.size + w.size + 8


def test_on_a_gpu_what_the_bytes_stand_for_is_multiplied(monkeypatch):
    x, w = normal(0, 32, 128).astype(jnp.bfloat16), normal(1, 256, 128).astype(jnp.bfloat16)
    want, back = jax.vjp(product, x, w)
    monkeypatch.setattr(fp8.devices, "platform", lambda: "gpu")
    got, back_there = jax.vjp(product, x, w)
    for a, b in zip((got, *back_there(want)), (want, *back(want)), strict=True):
        assert a.dtype == b.dtype and off(a.astype(jnp.float32), b.astype(jnp.float32)) < 0.01


def test_gates_and_odd_sizes_stay_in_16_bits():
    assert fp8.worthwhile((6144, 1536)) and not fp8.worthwhile((12, 24)) and not fp8.worthwhile((1000, 136))


def weighted(hidden, head, targets, weights, **more):
    return loss.weighted_nll(hidden, head, targets, weights, vocab=500, softcap=15.0, chunk=32, **more)


def test_the_loss_and_its_gradients_are_near_those_of_float32():
    hidden, head = 2 * normal(0, 80, 128), 0.3 * normal(1, 512, 128)
    targets = jax.random.randint(jax.random.key(2), (80,), 0, 500).at[::7].set(-1)
    weights = jnp.where(jnp.arange(80) % 3 == 0, -1.0, 1.0) / 80  # RL has negative ones
    exact, grads = jax.value_and_grad(weighted, (0, 1))(hidden, head, targets, weights)
    rough, grads8 = jax.value_and_grad(lambda *a: weighted(*a, eight_bits=True), (0, 1))(hidden, head, targets, weights)
    assert 0 < abs(float(rough / exact) - 1) < 0.02
    for got, want in zip(grads8, grads):
        assert 1e-3 < off(got, want) < 0.1
    ignored = np.asarray(targets) < 0
    assert ignored.any() and not np.asarray(grads8[0])[ignored].any()
    assert not np.asarray(grads8[1])[500:].any(), "the padding has no gradient"


def test_a_step_in_8_bits_is_near_one_in_16():
    cfg = GPTConfig(vocab_size=256, n_layer=1, n_head=1, n_kv_head=1, n_embd=128, sequence_len=16)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optim.make_optimizer(cfg, OptimConfig(), optim.make_schedules(OptimConfig(), 30, 0.0, "modern"), 2**14)
    ids = (np.arange(8)[:, None] * 7 + np.arange(17)).astype(np.int32)[None] % 256
    losses = {}
    for eight_bits in (False, True):
        step = loop.make_step(graph_of(cfg, jnp.float32, eight_bits), optimizer, jnp.float32, mesh)
        state, losses[eight_bits] = loop.init_state(cfg, optimizer, 0, mesh), []
        for _ in range(6):
            state, metrics = step(state, {"tokens": ids[..., :-1], "targets": ids[..., 1:]})
            losses[eight_bits].append(float(metrics["loss"]))
    assert losses[False] != losses[True] and losses[False][-1] < losses[False][0] - 0.1
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-3)


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_both_layouts_in_one_kernel(dtype, monkeypatch):
    h, da = normal(0, 128, 192), normal(1, 128, 192)
    for arrays, make in (([h], lambda x: x), ([h, da], fp8._relu_squared_gradient)):
        want, _ = fp8.quantize_both(arrays, dtype, make)
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "by_kernels", lambda x: True)
            got, transposed = fp8.quantize_both(arrays, dtype, make)
        assert got.scale == want.scale == transposed.scale and np.array_equal(transposed.values, got.values.T)
        a, b = (np.asarray(q.values, np.float32) for q in (got, want))
        assert np.mean(a != b) < 0.01 and np.allclose(a, b, rtol=0.3)  # 1 / scale rounds otherwise now and then


def test_several_products_of_one_array():
    x, ws, dys = (
        normal(0, 32, 128),
        (normal(1, 128, 128), normal(2, 256, 128)),
        (normal(3, 32, 128), normal(4, 32, 256)),
    )
    got, back = jax.vjp(fp8.products, x, ws)
    dx, dws = back(dys)
    alone = [jax.vjp(product, x, w) for w in ws]
    each = [pull(dy) for (_, pull), dy in zip(alone, dys)]
    assert all(np.array_equal(a, b) for a, (b, _) in zip(got, alone))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(dws, each)) and off(dx, each[0][0] + each[1][0]) < 1e-6


def test_mlp_is_near_that_of_float32():
    x, fc, proj, dy = normal(0, 64, 128), normal(1, 512, 128) / 11, normal(2, 128, 512) / 22, normal(3, 64, 128)
    y, back = jax.vjp(fp8.mlp, x, fc, proj)
    want, exact = jax.vjp(lambda x, fc, proj: jnp.square(jax.nn.relu(x @ fc.T)) @ proj.T, x, fc, proj)
    assert 1e-3 < off(y, want) < 0.08
    for got, grad in zip(back(dy), exact(dy)):
        assert got.shape == grad.shape and 1e-3 < off(got, grad) < 0.12

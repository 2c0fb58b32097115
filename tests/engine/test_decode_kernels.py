"""The kernels of a decode step, interpreted, beside the plain forms in cache.py and model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evals_fakes import FullLogits, tiny_model

from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import decode_kernels
from nanochat_jax.engine import engine as engines
from nanochat_jax.engine.engine import Engine, Request
from nanochat_jax.kernels.fused import rms_norm, rotate_and_norm
from nanochat_jax.model.gpt import rotary_tables
from nanochat_jax.model.quantize import rounded

GAIN, EPS = 1.2, 1e-5


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def plain(qkv, keys, values, position, slot, heads, window, value_embed, offset):
    """The same by the functions that other platforms run: (out, keys, values)."""
    (_, K, R, N), M, H = keys.shape, len(qkv), heads
    q, k, v, gate = jnp.split(qkv[:, None], [H * N, (H + K) * N, (H + 2 * K) * N], axis=-1)
    q, k, v = q.reshape(M, 1, H, N), k.reshape(M, 1, K, N), v.reshape(M, 1, K, N)
    if value_embed is not None:
        tokens, table = value_embed
        v = v + 3.0 * jax.nn.sigmoid(gate[..., :K])[..., None] * table[tokens].reshape(v.shape)
    rope = rotary_tables(position[:, None], N, 10000.0)
    q, k = (rotate_and_norm(x, rope, GAIN, EPS) for x in (q, k))
    cache = [(keys[None], values[None])]
    [rows] = kv.take(cache, slot[None], R)
    rows = tuple(kv.append(c, x, position[:, None], R) for c, x in zip(rows, (k, v)))
    out = kv.attend(q, *rows, position[:, None], position, window, R, offset)
    [(keys, values)] = kv.put(cache, slot[None], [rows], position[:, None])
    return out.reshape(M, H * N), keys[0], values[0]


@pytest.mark.parametrize(
    ("window", "ring", "heads", "kv_heads", "with_value", "offset"),
    [(70, 326, 4, 2, True, True), (70, 326, 1, 1, False, False), (130, 130, 1, 1, True, True)],
)
def test_attend_is_append_and_attend(window, ring, heads, kv_heads, with_value, offset):
    N, S = 16, 7
    # rows: the first position, inside the window, at its ends, wrapped once and more, and two that are not meant
    position = [0, 69, 70, ring, 5 * ring + 7, -1, 325] if ring > window + 1 else [0, 3, ring - 1, ring - 2, 64, -1, -1]
    position, slot = jnp.array(position), jnp.array([3, 1, 0, 4, 6, 5, 2])
    keys, values = normal(0, S, kv_heads, ring, N), normal(1, S, kv_heads, ring, N)
    qkv = normal(2, len(position), (heads + 2 * kv_heads) * N + 16)
    value_embed = (jnp.arange(len(position)), normal(3, 11, kv_heads * N)) if with_value else None
    rope = tuple(t[:, 0] for t in rotary_tables(jnp.arange(5 * ring + 8), N, 10000.0))
    got = decode_kernels.attend(
        qkv, keys, values, position, slot, rope,
        heads=heads, window=window, gain=GAIN, eps=EPS, value_embed=value_embed, offset=offset,
    )  # fmt: skip
    want = plain(qkv, keys, values, position, slot, heads, window, value_embed, offset)
    meant = np.asarray(position) >= 0
    np.testing.assert_allclose(got[0][meant], want[0][meant], atol=2e-5)
    assert np.isfinite(got[0]).all()
    for a, b, before in zip(got[1:], want[1:], (keys, values)):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert (np.asarray(a != before).any((1, 3)).sum(1) <= 1).all()  # one place of a slot, at most


def test_splits_fill_the_chip_and_no_more():
    assert decode_kernels.splits(2047, 1, 10) == 32 and decode_kernels.splits(512, 1, 10) == 8
    assert decode_kernels.splits(2047, 32, 10) == 3 and decode_kernels.splits(2047, 256, 10) == 1


@pytest.mark.parametrize(("width", "outputs"), [(320, 24), (64 * 17, 20)])
def test_matvec_with_all_that_goes_around_it(width, outputs):
    x, weight = normal(0, 1, width), normal(1, outputs, width)
    scale, residual, x0, factors = normal(2, outputs, 1), normal(3, 1, outputs), normal(4, 1, outputs), normal(5, 2)
    got = decode_kernels.matvec(x, weight)
    np.testing.assert_allclose(got, x @ weight.T, rtol=1e-4, atol=1e-4)
    got = decode_kernels.matvec(x, weight, norm=EPS, square=True)
    np.testing.assert_allclose(got, jnp.square(jax.nn.relu(rms_norm(x, EPS) @ weight.T)), rtol=1e-4, atol=1e-3)
    whole = jnp.round(weight * 20).astype(jnp.int8)
    got = decode_kernels.matvec(x, whole, scale, residual=residual, mix=(x0, factors))
    want = x @ (whole.astype(jnp.float32) * scale).T + residual
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(got[1], factors[0] * want + factors[1] * x0, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [3, 32])
def test_int8_product_of_a_few_rows(rows):
    x, values = normal(0, rows, 640), jnp.round(30 * normal(1, 192, 640)).astype(jnp.int8)
    got = decode_kernels.int8_product(x, values)
    np.testing.assert_allclose(got, x @ values.T.astype(jnp.float32), rtol=1e-4, atol=0.02)


@pytest.fixture
def interpreted(monkeypatch):
    """Engines made here decode by the kernels, interpreted."""
    monkeypatch.setattr(decode_kernels, "takes", lambda cfg: True)
    monkeypatch.setattr(decode_kernels, "_reads", lambda width: True)


@pytest.mark.parametrize(
    ("slots", "int8", "more"), [(1, True, {}), (3, False, {"key_offset": True, "head_values": True})]
)
def test_an_engine_of_kernels_says_what_the_full_forward_says(interpreted, slots, int8, more):
    model = tiny_model(sequence_len=640, **more)  # window 256, ring 512
    engine = Engine(model, slots=slots, max_len=640, int8=int8)
    assert "qkv" in engine.params["blocks"][0]["attn"]
    full = FullLogits(rounded(model) if int8 else model)
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, 256, n).tolist() for n in ((600,) if slots == 1 else (1, 255, 600))]
    done = engine.generate([Request(p, 3, temperature=0.0, logprobs=0) for p in asked])
    for prompt, completion in zip(asked, done):
        logits = full(prompt + completion.ids).astype(np.float64)
        want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place, (id, found) in enumerate(zip(completion.ids, completion.logprobs), len(prompt) - 1):
            assert abs(found.logprob - want[place, id]) < (0.05 if int8 else 1e-4)
            assert want[place, id] > want[place].max() - (0.1 if int8 else 1e-4)


def test_kernels_that_are_wrong_on_a_device_are_left_out(interpreted, monkeypatch, capsys):
    engines.kernels_agree.cache_clear()
    model = tiny_model(sequence_len=320)
    assert engines.kernels_agree(model.cfg, np.dtype("float32"), 320)
    right = decode_kernels.attend

    def wrong(*args, window, **more):
        return right(*args, window=window - 1, **more)

    def fails(*args, **more):
        raise ValueError("no such kernel")

    for broken in (wrong, fails):
        engines.kernels_agree.cache_clear()
        monkeypatch.setattr(decode_kernels, "attend", broken)
        engine = Engine(model, slots=1, max_len=320)
        assert "q" in engine.params["blocks"][0]["attn"] and "do not agree" in capsys.readouterr().err
    engines.kernels_agree.cache_clear()

"""The loss as a GPU computes it, in Pallas' interpreter, against the plain path of a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import relative_error
from nanochat_jax import devices
from nanochat_jax.kernels import cross_entropy
from nanochat_jax.model import loss

SOFTCAP = 15.0


def example(tokens, size, vocab, dtype, scale=1.0):
    """hidden, head, targets (some of them ignored) and weights of both signs."""
    key = jax.random.split(jax.random.key(tokens), 4)
    hidden = (scale * jax.random.normal(key[0], (tokens, 32))).astype(dtype)
    head = jax.random.normal(key[1], (size, 32)).astype(dtype)
    targets = jax.random.randint(key[2], (tokens,), 0, vocab).at[::5].set(-1)
    return hidden, head, targets, jax.random.normal(key[3], (tokens,))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A context in which the loss takes the GPU's path, its kernels interpreted."""
    monkeypatch.setattr(cross_entropy, "launch", functools.partial(cross_entropy.launch, interpret=True))
    return functools.partial(devices.tracing_for, "gpu")


# vocabularies of one tile and of several, with padding within a tile and of whole tiles
SHAPES = [(48, 16, 2048, 1500), (33, 16, 1024, 1024), (40, 16, 384, 250), (24, 64, 97, 90)]


@pytest.mark.parametrize("tokens, chunk, size, vocab", SHAPES)
@pytest.mark.parametrize("dtype, close", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_a_gpu_finds_the_loss_and_the_gradients_of_a_cpu(as_on_a_gpu, tokens, chunk, size, vocab, dtype, close):
    hidden, head, targets, weights = example(tokens, size, vocab, dtype)

    def value_and_grad(hidden, head):
        def nll(hidden, head):
            return loss.weighted_nll(hidden, head, targets, weights, vocab=vocab, softcap=SOFTCAP, chunk=chunk)

        return jax.value_and_grad(nll, (0, 1))(hidden, head)

    exact, grads = value_and_grad(hidden.astype(jnp.float32), head.astype(jnp.float32))
    with as_on_a_gpu():
        value, found = value_and_grad(hidden, head)
    assert relative_error(value, exact) < close
    for got, want in zip(found, grads, strict=True):
        assert got.dtype == dtype
        assert relative_error(got.astype(jnp.float32), want) < close
    assert not np.asarray(found[0])[np.asarray(targets) < 0].any()
    assert not np.asarray(found[1])[vocab:].any()


@pytest.mark.parametrize("tokens, chunk, size, vocab", [(48, 16, 512, 500), (33, 16, 1024, 1024)])
@pytest.mark.parametrize("dtype, close", [(jnp.float32, 1e-2), (jnp.bfloat16, 3e-2)])
def test_a_gpu_finds_the_same_in_8_bits(as_on_a_gpu, tokens, chunk, size, vocab, dtype, close):
    hidden, head, targets, weights = example(tokens, size, vocab, dtype)

    def nll(hidden, head):
        more = {"vocab": vocab, "softcap": SOFTCAP, "chunk": chunk, "eight_bits": True}
        return loss.weighted_nll(hidden, head, targets, weights, **more)

    value, grads = jax.value_and_grad(nll, (0, 1))(hidden, head)
    with as_on_a_gpu():
        there, found = jax.value_and_grad(nll, (0, 1))(hidden, head)
    assert relative_error(there, value) < close
    for got, want in zip(found, grads, strict=True):
        assert got.dtype == dtype
        assert relative_error(got.astype(jnp.float32), want.astype(jnp.float32)) < close


def test_both_layouts_of_what_is_rounded():
    z = 6 * jax.random.normal(jax.random.key(0), (96, 384))
    targets = jnp.arange(96)
    u, want_sums = cross_entropy.terms(z, targets, 380, SOFTCAP)
    sums, most = cross_entropy.sums(z, targets, 380, SOFTCAP)
    np.testing.assert_allclose(sums, want_sums, rtol=1e-6)
    np.testing.assert_allclose(most, u.max(axis=1), rtol=1e-6)
    factors = jnp.linspace(-1.0, 1.0, 96) * 57344 * 1.004 / u.max()  # as much above as a scale in bfloat16 can be
    g, turned = cross_entropy.rounded(z, targets, factors, 380, SOFTCAP, jnp.float8_e5m2)
    np.testing.assert_array_equal(g.astype(jnp.float32).T, turned.astype(jnp.float32))
    want = jnp.clip(u * factors[:, None], -57344, 57344).astype(jnp.float8_e5m2)
    assert np.mean(np.asarray(g.astype(jnp.float32) != want.astype(jnp.float32))) < 1e-3  # on the border of two


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e3])
def test_the_terms_of_logits_of_any_size(scale):
    z = scale * jax.random.normal(jax.random.key(0), (12, 1280))
    targets = np.arange(12) * 100
    u, sums = cross_entropy.terms(z, jnp.asarray(targets), 1200, SOFTCAP)
    x = np.asarray(z, np.float64) / SOFTCAP
    e = np.exp(SOFTCAP * np.tanh(x))
    e[np.arange(12), targets] = e[:, 1200:] = 0
    np.testing.assert_allclose(sums, e.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(u, e / np.cosh(np.clip(x, -99, 99)) ** 2, rtol=1e-4, atol=1e-12)


def test_chunks_of_a_gpu_are_even_and_hold_what_there_is():
    with devices.tracing_for("gpu"):
        for tokens in (1, 100, 8192, 8193, 20480, 32768):
            chunk = loss._chunk(tokens, None, jnp.bfloat16)
            assert chunk <= loss.GPU_CHUNK
            assert 0 <= -tokens % chunk < loss.GPU_TILE * -(-tokens // chunk)
            assert loss._chunk(tokens, None) <= loss.GPU_CHUNK // 2


@pytest.mark.parametrize("tokens, vocab, size", [(33, 500, 128), (96, 500, 100), (400, 500, 480), (40, 1024, 1023)])
def test_a_sample_of_the_vocabulary(tokens, vocab, size):
    """The loss over the entries that were drawn, each with its count, and gradients of that."""
    hidden, head, targets, weights = example(tokens, 1024, vocab, jnp.float32)
    drawn = loss.draw_sample(jnp.maximum(targets, 0), vocab, size)
    assert len(set(np.asarray(drawn.ids).tolist())) == size and float(drawn.counts.sum()) == pytest.approx(vocab)
    found, wanted = set(np.asarray(drawn.ids).tolist()), set(np.maximum(targets, 0).tolist())
    assert wanted <= found or len(wanted & found) == size // 2

    def plain(hidden, head):
        z = SOFTCAP * jnp.tanh(hidden @ head.T / SOFTCAP)
        own = jnp.take_along_axis(z, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
        e = jnp.where(drawn.ids == targets[:, None], 0.0, jnp.exp(z[:, drawn.ids]) * drawn.counts)
        return (jnp.where(targets >= 0, weights, 0) * (jnp.log(e.sum(1) + jnp.exp(own)) - own)).sum()

    def ours(hidden, head):
        more = {"vocab": vocab, "softcap": SOFTCAP, "chunk": 16, "drawn": drawn}
        return loss.weighted_nll(hidden, head, targets, weights, **more)

    want, grads = jax.value_and_grad(plain, (0, 1))(hidden, head)
    value, found = jax.value_and_grad(ours, (0, 1))(hidden, head)
    assert relative_error(value, want) < 1e-5
    for got, expected in zip(found, grads, strict=True):
        assert relative_error(got, expected) < 1e-5


def test_a_sample_is_right_in_the_mean():
    vocab, size = 400, 120
    hidden, head, *_ = example(1, 512, vocab, jnp.float32, scale=0.2)
    e = jnp.exp(SOFTCAP * jnp.tanh(hidden[0] @ head.T / SOFTCAP))[:vocab]
    targets = jax.random.randint(jax.random.key(1), (600, 90), 0, vocab)
    drawn = jax.vmap(lambda t: loss.draw_sample(t, vocab, size))(targets)
    sums = (e[drawn.ids] * drawn.counts).sum(axis=1) / e.sum()
    error = float(sums.std() / np.sqrt(len(sums)))
    assert abs(float(sums.mean()) - 1) < 4 * error < 0.05

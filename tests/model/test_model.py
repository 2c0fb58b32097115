"""The model and the loss against the reference's figures, and against their own definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import relative_error
from nanochat_jax.config import GPTConfig
from nanochat_jax.model import loss as loss_lib
from nanochat_jax.model.attention import causal_attention, offset_keys
from nanochat_jax.model.gpt import GPT
from nanochat_jax.weights.names import to_reference

TINY = GPTConfig(vocab_size=97, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, sequence_len=64)


def mean_loss(model, tokens, targets):
    weights = (targets >= 0) / jnp.maximum((targets >= 0).sum(), 1)
    head = model.lm_head.weight[...]
    return loss_lib.weighted_nll(
        model.hidden(tokens), head, targets, weights, vocab=model.cfg.vocab_size, softcap=model.cfg.softcap, chunk=100
    )


def stride(golden) -> tuple[str, int]:
    (name,) = [k for k in golden.arrays if k.startswith("logits_every_")]
    return name, int(name.rsplit("_", 1)[1])


def test_golden_logits(golden):
    name, every = stride(golden)
    logits = nnx.jit(lambda m, t: m(t))(golden.model(), golden.arrays["tokens"])
    assert relative_error(logits[:, ::every], golden.arrays[name]) < 1e-4


def test_golden_loss_and_gradients(golden):
    model, a = golden.model(), golden.arrays
    value, grads = nnx.jit(nnx.value_and_grad(mean_loss))(model, a["tokens"], a["targets"])
    assert relative_error(value, a["loss"]) < 1e-4
    got = to_reference(nnx.to_pure_dict(grads), golden.cfg)
    want = golden.tensors("g")
    assert set(want) == set(got) or not want
    if golden.meta.get("pad_token_id") is not None and want:  # torch gives the padding row of its table no gradient
        table = got["model.embed_tokens.weight"] = got["model.embed_tokens.weight"].copy()
        table[golden.meta["pad_token_id"]] = 0
    for name, g in want.items():
        assert relative_error(got[name], g) < 1e-4, name


def test_golden_loss_per_token(golden_modern):
    model, a = golden_modern.model(), golden_modern.arrays
    nll, best = nnx.jit(
        lambda m, x, y: loss_lib.token_nll(
            m.hidden(x), m.lm_head.weight[...], y, vocab=m.cfg.vocab_size, softcap=m.cfg.softcap, chunk=64
        )
    )(model, a["tokens"], a["targets"])
    assert relative_error(nll, a["loss_per_token"]) < 1e-4
    name, every = stride(golden_modern)
    assert (np.asarray(best)[:, ::every] == a[name].argmax(-1)).mean() > 0.999


def test_golden_greedy_by_full_forward(golden):
    a = golden.arrays
    prompt = a["prompt"] if "prompt" in a else a["greedy_prompt"]
    ids = [int(t) for t in prompt]
    forward = nnx.jit(lambda m, t: m(t))
    model, room = golden.model(), len(prompt) + len(a["greedy"])
    for _ in range(len(a["greedy"])):
        padded = jnp.asarray([ids + [0] * (room - len(ids))], jnp.int32)
        ids.append(int(forward(model, padded)[0, len(ids) - 1].argmax()))
    tail = ids[-len(a["greedy"]) :]
    assert tail == [int(t) for t in a["greedy"]]


def naive_attention(q, k, v, window):
    B, T, H, N = q.shape
    k, v = (np.repeat(x, H // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bthn,bshn->bhts", q, k) / np.sqrt(N)
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (distance >= 0) & (distance <= (T if window is None else window))
    scores = np.where(seen, scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshn->bthn", probs / probs.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "T,window", [(1, None), (7, None), (300, None), (300, 1), (300, 64), (300, 130), (257, 256), (64, 0)]
)
def test_blocks_equal_the_whole_square(T, window):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, T, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, T, 2, 8)).astype(np.float32)
    got = causal_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), window, backend="blocks")
    np.testing.assert_allclose(got, naive_attention(q, k, v, window), atol=2e-5)


def test_windowed_blocks_never_build_the_square():
    T, window = 1024, 128
    x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    text = str(jax.make_jaxpr(lambda q, k, v: causal_attention(q, k, v, window, backend="blocks"))(x, x, x))
    assert f"{T},{T}]" not in text.replace(" ", "")


@pytest.mark.parametrize("vocab,chunk", [(97, 7), (128, 64), (97, 1000)])
def test_chunked_loss_equals_the_plain_one(vocab, chunk):
    """Value and gradients, with ignored targets, uneven chunks, padding of the vocabulary and token weights."""
    key = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(key[0], (3, 11, 16))
    head = jax.random.normal(key[1], (128, 16))
    targets = jax.random.randint(key[2], (3, 11), 0, vocab).at[0, :4].set(-1)
    weights = jax.random.normal(key[3], (3, 11))

    def plain(hidden, head):
        logits = 15.0 * jnp.tanh(hidden @ head.T / 15.0)[..., :vocab]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return (jnp.where(targets >= 0, weights, 0) * nll).sum()

    def chunked(hidden, head):
        return 3.0 * loss_lib.weighted_nll(hidden, head, targets, weights, vocab=vocab, softcap=15.0, chunk=chunk)

    want, want_g = jax.value_and_grad(plain, (0, 1))(hidden, head)
    got, got_g = jax.value_and_grad(chunked, (0, 1))(hidden, head)
    assert relative_error(got, 3 * want) < 1e-5
    for g, w in zip(got_g, want_g):
        assert relative_error(g, 3 * w) < 1e-5


def test_initial_loss_is_that_of_a_uniform_guess():
    model = GPT(TINY, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, TINY.vocab_size)
    assert abs(float(mean_loss(model, tokens[:, :-1], tokens[:, 1:])) - np.log(TINY.vocab_size)) < 0.05


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_last_layer_starts_by_looking_at_what_followed_the_same_token(n_kv_head):
    cfg = dataclasses.replace(TINY, vocab_size=64, n_head=2, n_kv_head=n_kv_head, n_embd=128, key_offset=True)
    seen = {}

    def attend(layer, q, k, v):
        seen[layer] = q, jnp.repeat(offset_keys(k), cfg.n_head // n_kv_head, axis=2)
        return jnp.zeros_like(q)

    tokens = jax.random.permutation(jax.random.key(1), 64)[None, :40]
    tokens = tokens.at[0, 30].set(tokens[0, 11])
    GPT(cfg, rngs=nnx.Rngs(0)).trunk(tokens, jnp.arange(40), attend)
    scores = [jnp.einsum("hn,thn->ht", q[0, 30], k[0, :31]) for q, k in seen.values()]
    heads = slice(0, None, cfg.n_head // n_kv_head)  # of the queries that keys are alike to
    assert (scores[-1][heads].argmax(axis=-1) == 12).all()
    assert not (scores[0].argmax(axis=-1) == 12).any()


@pytest.mark.parametrize("bigram_rows", [0, 50])
def test_no_position_sees_the_future(bigram_rows):
    model = GPT(dataclasses.replace(TINY, bigram_rows=bigram_rows, key_offset=True, head_values=True), rngs=nnx.Rngs(0))
    if bigram_rows:
        model.bigrams.embedding[...] = jax.random.normal(jax.random.key(4), (bigram_rows, TINY.n_embd))
    model.smear_lambda[...] = jnp.ones(1)
    for block in model.blocks:  # the zero-initialised projections would hide a leak
        for linear in (block.attn.proj, block.mlp.proj):
            linear.weight[...] = jax.random.normal(jax.random.key(3), linear.weight.shape)
    a = jax.random.randint(jax.random.key(0), (1, 40), 0, TINY.vocab_size)
    b = a.at[:, 25:].set((a[:, 25:] + 1) % TINY.vocab_size)
    np.testing.assert_array_equal(model.hidden(a)[:, :25], model.hidden(b)[:, :25])
    assert not np.allclose(model.hidden(a)[:, 25], model.hidden(b)[:, 25])

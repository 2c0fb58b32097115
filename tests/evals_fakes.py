"""What the tests of evals share: a tokenizer of bytes, and a model of a few thousand parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.config import GPTConfig
from nanochat_jax.model.gpt import GPT
from tokenizer import SPECIAL_TOKENS


class ByteTokenizer:
    """The Tokenizer's interface over 256 bytes and the special tokens: no training, and what is expected is plain."""

    vocab_size = 256 + len(SPECIAL_TOKENS)
    hash = "0" * 16

    def __init__(self):
        for i, name in enumerate(SPECIAL_TOKENS):
            setattr(self, name[2:-2], 256 + i)

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts, num_threads=None):
        return [self.encode(t) for t in texts]

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        return np.array([1] * 256 + [0] * len(SPECIAL_TOKENS), np.int32)


def tiny_model(sequence_len=192, vocab_size=ByteTokenizer.vocab_size, seed=0, **more):
    """A GPT whose output is not constant: the projections that start at zero, and the head, get random weights."""
    cfg = GPTConfig(
        vocab_size=vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        n_embd=32,
        sequence_len=sequence_len,
        window_pattern="SL",
        **more,
    )
    model = GPT(cfg, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for block in model.blocks:
        for linear in (block.attn.proj, block.mlp.proj):
            linear.weight[...] = jnp.asarray(0.1 * rng.normal(size=linear.weight.shape), jnp.float32)
    if model.cfg.bigram_rows:
        table = model.bigrams.embedding
        table[...] = jnp.asarray(rng.normal(size=table.shape), jnp.float32)
    model.lm_head.weight[...] = jnp.asarray(0.5 * rng.normal(size=model.lm_head.weight.shape), jnp.float32)
    return model


class FullLogits:
    """logits (T, V) of one sequence at a time, padded to the context length, so that one program serves all tests."""

    def __init__(self, model):
        self.limit = model.cfg.sequence_len
        graph, state = nnx.split(model)
        self._run = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens))

    def __call__(self, ids):
        ids = list(ids)
        tokens = jnp.asarray([ids + [0] * (self.limit - len(ids))], jnp.int32)
        return np.asarray(self._run(tokens))[0, : len(ids)]

    def nll(self, ids):
        """(T - 1,) of the tokens after the first."""
        z = self(ids)[:-1].astype(np.float64)
        return np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), ids[1:]]

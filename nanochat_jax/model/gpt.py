"""The GPT, from configuration to logits.

`modern` (windows, residual scalars, value embeddings, smear, backout) and `classic` (none of these) are both
a `GPTConfig`. Weights are float32 masters stored (out, in); products run in `dtype`. The caller supplies
the attention function: training a causal one, the engine one that uses its cache.

Shapes: B batch, T time, D width, H query heads, K key/value heads, N head size, V vocabulary (padded where stored).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, uniform, zeros

from nanochat_jax.config import GPTConfig
from nanochat_jax.kernels import fp8
from nanochat_jax.kernels.fused import add_and_norm, mix_and_norm, relu_squared, rms_norm, rotate_and_norm
from nanochat_jax.kernels.products import is_one_step, product
from nanochat_jax.kernels.segments import look_up
from nanochat_jax.model import remat
from nanochat_jax.model.attention import causal_attention, is_offset, offset_keys
from nanochat_jax.model.scaling import GATE_CHANNELS, SMEAR_CHANNELS

# (layer, q (B, T, H, N), k (B, T, K, N), v (B, T, K, N)) -> (B, T, H, N)
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

HASH = np.uint32(2654435761)  # 2^32 over the golden ratio, a prime (Knuth, volume 3, section 6.4)


def rotary_tables(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin (..., T, 1, N/2) for positions (..., T). RoPE: Su et al., arXiv 2104.09864."""
    frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _uniform(bound):
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _spectral(key, shape):
    """N(0, min(1, sqrt(out / in)) / sqrt(in)): the classic matrices."""
    out, inner = shape
    return normal(min(1.0, math.sqrt(out / inner)) / math.sqrt(inner))(key, shape)


def _initialisers(cfg: GPTConfig) -> dict[str, Callable]:
    if cfg.init == "classic":
        return {"wte": normal(1.0), "head": zeros, "qkv": _spectral, "fc": _spectral, "value": zeros}
    s = math.sqrt(3 / cfg.n_embd)
    qkv, fc = _uniform(s), _uniform(0.4 * s)
    return {"wte": normal(0.8), "head": normal(0.001), "qkv": qkv, "fc": fc, "value": _uniform(s)}


def _like_queries(k: jax.Array, q: jax.Array, cfg: GPTConfig) -> jax.Array:
    """Weights of keys (K * N, D) with their offset channels initialised as the queries': an induction head from the
    first step on (a token attends to what followed the same token before), which else takes hundreds of steps to form.
    """
    K, N, D = cfg.n_kv_head, cfg.head_dim, cfg.n_embd
    first = q.reshape(K, -1, N, D)[:, 0]  # of the query heads that read a key head
    return jnp.where(is_offset(N)[:, None], first, k.reshape(K, N, D)).reshape(K * N, D)


class Linear(nnx.Module):
    """x (..., in) -> (..., out) in x's dtype, no bias; by 8-bit products if `eight_bits` is set and it is large."""

    def __init__(self, n_in: int, n_out: int, init: Callable, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (n_out, n_in)))
        self.eight_bits = False

    @property
    def in_eight_bits(self) -> bool:
        return self.eight_bits and fp8.worthwhile(self.weight[...].shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self)[0]


def project(x: jax.Array, *linears: Linear) -> tuple[jax.Array, ...]:
    """Each Linear of x; with 8-bit products x is quantised once for all of them."""
    weights = tuple(linear.weight[...].astype(x.dtype) for linear in linears)
    if linears[0].in_eight_bits:
        return fp8.products(x, weights)
    if len(weights) > 1 and is_one_step(x):  # XLA joins the weights once, outside of the loop over tokens
        ends = np.cumsum([len(w) for w in weights])[:-1]
        return tuple(jnp.split(product(x, jnp.concatenate(weights)), ends, axis=-1))
    return tuple(product(x, weight) for weight in weights)


class Embedding(nnx.Module):
    """ids (...) -> rows (..., D)."""

    def __init__(self, rows: int, width: int, init: Callable, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (rows, width)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        with jax.named_scope("embedding"):
            return look_up(self.embedding[...], ids)


class Attention(nnx.Module):
    def __init__(self, cfg: GPTConfig, layer: int, rngs: nnx.Rngs):
        self.cfg = cfg
        init, D, kv = _initialisers(cfg), cfg.n_embd, cfg.n_kv_head * cfg.head_dim
        self.q = Linear(D, D, init["qkv"], rngs)
        self.k = Linear(D, kv, init["qkv"], rngs)
        if cfg.key_offset and layer == cfg.n_layer - 1:
            self.k.weight[...] = _like_queries(self.k.weight[...], self.q.weight[...], cfg)
        self.v = Linear(D, kv, init["qkv"], rngs)
        self.proj = Linear(D, D, zeros, rngs)
        gated = cfg.has_value_embed(layer)
        self.ve_gate = Linear(GATE_CHANNELS, cfg.n_kv_head, uniform(0.02), rngs) if gated else None

    def __call__(self, x, rope, attend, value_embed=None):
        """x (B, T, D); value_embed (B, T, K * N) or None. ResFormer's value residual: arXiv 2410.17897."""
        cfg, (B, T, D) = self.cfg, x.shape
        q, k, v = remat.named(project(x, self.q, self.k, self.v), "qkv")
        q, k, v = (y.reshape(B, T, -1, cfg.head_dim) for y in (q, k, v))
        if self.ve_gate is not None:
            gate = 3.0 * jax.nn.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * value_embed.reshape(v.shape)
        q, k = (rotate_and_norm(t, rope, cfg.qk_gain, cfg.norm_eps) for t in (q, k))
        return remat.named(self.proj(attend(q, k, v).reshape(B, T, D)), "attended")


class MLP(nnx.Module):
    """relu(x)^2, four times as wide (Primer: arXiv 2109.08668)."""

    def __init__(self, cfg: GPTConfig, rngs: nnx.Rngs):
        self.fc = Linear(cfg.n_embd, 4 * cfg.n_embd, _initialisers(cfg)["fc"], rngs)
        self.proj = Linear(4 * cfg.n_embd, cfg.n_embd, zeros, rngs)

    def __call__(self, x):
        if self.fc.in_eight_bits:
            return fp8.mlp(x, *(linear.weight[...].astype(x.dtype) for linear in (self.fc, self.proj)))
        return self.proj(relu_squared(self.fc(x)))


class Block(nnx.Module):
    """The two parts of a layer; `GPT.trunk` adds their results to the residual stream."""

    def __init__(self, cfg: GPTConfig, layer: int, rngs: nnx.Rngs):
        self.attn = Attention(cfg, layer, rngs)
        self.mlp = MLP(cfg, rngs)


class GPT(nnx.Module):
    """tokens (B, T) int32 -> logits (B, T, V) float32."""

    def __init__(self, cfg: GPTConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.cfg, self.dtype, self.remat = cfg, dtype, "none"
        init, D, V = _initialisers(cfg), cfg.n_embd, cfg.padded_vocab
        self.wte = Embedding(V, D, init["wte"], rngs)
        self.lm_head = Linear(D, V, init["head"], rngs)
        self.blocks = nnx.List([Block(cfg, i, rngs) for i in range(cfg.n_layer)])
        if cfg.residual_scalars:
            depth = np.arange(cfg.n_layer) / max(cfg.n_layer - 1, 1)  # of each layer, 0 to 1
            self.resid_scalars = nnx.Param(jnp.asarray(1.15 - 0.10 * depth, jnp.float32))
            self.x0_scalars = nnx.Param(jnp.asarray(0.20 - 0.15 * depth, jnp.float32))
        if cfg.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1, uniform(0.02), rngs)
            self.smear_lambda = nnx.Param(jnp.zeros((1,), jnp.float32))
        if cfg.backout:
            self.backout_lambda = nnx.Param(jnp.full((1,), 0.2, jnp.float32))
        if cfg.bigram_rows:
            self.bigrams = Embedding(cfg.bigram_rows, D, zeros, rngs)
        if layers := [i for i in range(cfg.n_layer) if cfg.has_value_table(i)]:
            kv = cfg.n_kv_head * cfg.head_dim
            self.value_embeds = nnx.Dict({str(i): Embedding(V, kv, init["value"], rngs) for i in layers})

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Normed token embeddings (..., D), before the smear."""
        return rms_norm(self.wte(tokens).astype(self.dtype), self.cfg.norm_eps)

    def value_embed(self, i: int, tokens: jax.Array) -> jax.Array | None:
        """What layer i adds to the values of `tokens`, (..., K * N), or None. Where these are the head's rows (the
        first K * N channels of each), what an induction head finds is in the terms of the logits."""
        cfg = self.cfg
        if cfg.has_value_table(i):
            return self.value_embeds[str(i)](tokens).astype(self.dtype)
        if not cfg.reads_head(i):
            return None
        rows = look_up(self.lm_head.weight[...], tokens)[..., : cfg.n_kv_head * cfg.head_dim]
        return rms_norm(rows, cfg.norm_eps).astype(self.dtype)

    def _smear(self, x, prev_tokens):
        """Adds a gated copy of the previous token's embedding; prev_tokens as in `trunk`."""
        before = jnp.zeros_like(x[:, :1])
        if prev_tokens is not None:
            prev_tokens = prev_tokens.reshape(len(x), -1)
            before = jnp.where(prev_tokens[..., None] >= 0, self.embed(prev_tokens), 0)
        shifted = jnp.concatenate([before, x[:, :-1]], axis=1) if before.shape[1] == 1 else before
        gate = jax.nn.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + self.smear_lambda[...].astype(x.dtype) * gate * shifted

    def _bigrams(self, tokens, prev_tokens):
        """Rows (B, T, D) of every token and the one before it, by a hash; prev_tokens as in `trunk`."""
        before = jnp.full_like(tokens[:, :1], -1) if prev_tokens is None else prev_tokens.reshape(len(tokens), -1)
        before = jnp.concatenate([before, tokens[:, :-1]], axis=1) if before.shape[1] == 1 else before
        pairs = before.astype(jnp.uint32) * HASH + tokens.astype(jnp.uint32)
        return self.bigrams((pairs * HASH % self.cfg.bigram_rows).astype(jnp.int32)).astype(self.dtype)

    def _layer(self, i: int, tokens, rope, attend: Attend, x, mlp_out, x0):
        """One layer: x, the MLP's result, which is not yet added to it, and x0, all for the next.

        mlp_out: the result of the layer below; None at the first.
        """
        cfg, block = self.cfg, self.blocks[i]
        if cfg.residual_scalars:
            r, s = self.resid_scalars[...][i], self.x0_scalars[...][i]
            x, normed, x0 = mix_and_norm(x, mlp_out, x0, r, s, cfg.norm_eps)
        elif mlp_out is None:
            normed = rms_norm(x, cfg.norm_eps)
        else:
            x, normed = add_and_norm(x, mlp_out, cfg.norm_eps)
        attended = block.attn(normed, rope, functools.partial(attend, i), self.value_embed(i, tokens))
        x, normed = add_and_norm(x, attended, cfg.norm_eps)
        return x, block.mlp(normed), x0

    def trunk(self, tokens, positions, attend: Attend, prev_tokens=None) -> jax.Array:
        """Normed hidden states (B, T, D) that the head reads.

        tokens (B, T); positions (T,) or (B, T), for the rotary embedding; prev_tokens: the token before each row, (B,),
        or before each position, (B, T), where a row is not a run of text; negative for none.
        """
        cfg, x = self.cfg, self.embed(tokens)
        if cfg.smear:
            x = self._smear(x, prev_tokens)
        if cfg.bigram_rows:
            x = x + self._bigrams(tokens, prev_tokens)
        rope = rotary_tables(positions, cfg.head_dim, cfg.rope_base)
        x0 = x
        mlp_out: Any = None  # of the last layer, not yet added to x
        for i in range(cfg.n_layer):
            layer = functools.partial(self._layer, i, tokens, rope, attend)
            x, mlp_out, x0 = remat.layer(layer, self.remat)(x, mlp_out, x0)
            if i == cfg.n_layer // 2:
                middle = x + mlp_out  # for backout
        x = x + mlp_out
        if cfg.backout:
            x = x - self.backout_lambda[...].astype(x.dtype) * middle
        return rms_norm(x, cfg.norm_eps)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """tokens (B, T) from position 0 -> (B, T, D), each position seeing itself and its window."""
        return self.trunk(tokens, jnp.arange(tokens.shape[1]), self.attend)

    def attend(self, i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Layer i's attention over rows from position 0."""
        return causal_attention(q, offset_keys(k) if self.cfg.key_offset else k, v, self.cfg.windows[i])

    def uncapped(self, hidden: jax.Array) -> jax.Array:
        """hidden (..., D) -> logits (..., V) float32 before the softcap, the padding sliced away."""
        return self.lm_head(hidden)[..., : self.cfg.vocab_size].astype(jnp.float32)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden (..., D) -> softcapped logits (..., V) float32."""
        return softcapped(self.uncapped(hidden), self.cfg.softcap)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.hidden(tokens))


def softcapped(z: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(z / softcap)


def graph_of(cfg: GPTConfig, dtype, eight_bits: bool = False, level: str = "none"):
    """The model without its parameters, for `merge`; eight_bits: see `Linear`; level: see `remat`."""
    model = nnx.eval_shape(lambda: GPT(cfg, rngs=nnx.Rngs(0), dtype=dtype))
    model.remat = level
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.eight_bits = eight_bits
    return nnx.split(model)[0]


def init_params(cfg: GPTConfig, seed: int) -> dict:
    """Fresh parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(GPT(cfg, rngs=nnx.Rngs(params=seed)))[1])


def merge(graph, params: dict) -> GPT:
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))


def cast_matrices(params: dict, dtype) -> dict:
    """Matrices and tables in `dtype`; vectors and scalars stay float32."""
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)

"""Muon for the matrices, AdamW for tables, head and scalars, as optax transformations partitioned by parameter.

Every rate, momentum and decay is a pure function of the step. Muon: Jordan 2024; Polar Express: arXiv 2505.16932;
NorMuon: arXiv 2510.05491; AdamW: arXiv 1711.05101. Matrices are stored (out, in): rows are outputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.config import GPTConfig, OptimConfig
from nanochat_jax.kernels.products import matmul
from nanochat_jax.mesh import sharding
from nanochat_jax.model.scaling import REFERENCE_BATCH, REFERENCE_WIDTH

# Polar Express for 5 iterations: (a, b, c) of X <- aX + (bA + cAA)X with A = X X^T (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # the quintic of Muon's first form
NORMUON_BETA2 = 0.9
EPS = 1e-10
TINY = 1e-30  # a mean of squares that is as good as 0

Schedule = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Schedules:
    """Functions of the step (int32 scalar, the first is 0)."""

    lr: Schedule  # multiplies every rate
    momentum: Schedule  # Muon's
    weight_decay: Schedule  # Muon's


def make_schedules(cfg: OptimConfig, steps: int, weight_decay: float, arch: str) -> Schedules:
    """The recipe's schedules over `steps` steps.

    Learning rate, as a share of its peak: warm-up, constant, linear warm-down. Muon's momentum: up, constant, and down
    with the rate. Weight decay: half a cosine to 0.
    """
    warmdown = round(cfg.warmdown * steps)

    def warmdown_progress(step):
        """0 before the warm-down, rising to 1 at its end."""
        return jnp.clip((step - (steps - warmdown)) / max(warmdown, 1), 0.0, 1.0)

    def lr(step):
        up = jnp.minimum((step + 1) / max(cfg.warmup_steps, 1), 1.0)
        return jnp.where(step < cfg.warmup_steps, up, 1.0 + warmdown_progress(step) * (cfg.final_lr - 1.0))

    def momentum(step):
        if arch == "classic":
            return 0.85 + 0.10 * jnp.minimum(step / 300, 1.0)
        warmup = 0.85 + 0.12 * step / 400
        return jnp.where(step < 400, warmup, 0.97 + warmdown_progress(step) * (0.90 - 0.97))

    def decay(step):
        return weight_decay * 0.5 * (1.0 + jnp.cos(math.pi * step / steps))

    return Schedules(lr, momentum, decay)


# ------------------------------------------------------------------------------------------------- AdamW


class AdamState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count; checkpoints know it by this name
    m: optax.Updates
    v: optax.Updates  # `Factors` in place of a table, where the state is light


class Factors(NamedTuple):
    """A second moment (n, m) as the product of its rows' means and its columns' over the mean of all: Adafactor, arXiv
    1804.04235."""

    rows: jax.Array  # (n, 1)
    columns: jax.Array  # (1, m)


def adamw(
    rate: float, betas: tuple[float, float], weight_decay: float, lr: Schedule, light: bool = False
) -> optax.GradientTransformation:
    """p <- p (1 - lr wd) - lr m^ / (sqrt(v^) + eps), the decay before the update.

    light: of tables m is kept in bfloat16, and v as `Factors`.
    """
    b1, b2 = betas

    def averaged(old, new):
        return old + (1 - b2) * (new - old)

    def init(params):
        def second(p):
            zeros = jnp.zeros(p.shape, jnp.float32)
            return Factors(zeros[:, :1], zeros[:1]) if light and p.ndim == 2 else zeros

        m = optax.tree.zeros_like(params, jnp.float32)
        return AdamState(jnp.zeros((), jnp.int32), _stored(m, light), jax.tree.map(second, params))

    def update(grads, state, params):
        alpha, t = rate * lr(state.count), (state.count + 1).astype(jnp.float32)
        m = jax.tree.map(lambda m, g: m + (1 - b1) * (g - m), state.m, grads)

        def second(g, v):
            if not isinstance(v, Factors):
                return averaged(v, g * g)
            return Factors(*(averaged(old, (g * g).mean(axis, keepdims=True)) for old, axis in zip(v, (1, 0))))

        def step(p, m, v):
            v = v.rows * (v.columns / jnp.maximum(v.rows.mean(), TINY)) if isinstance(v, Factors) else v
            denominator = jnp.sqrt(v / (1 - b2**t)) + EPS
            return -alpha * weight_decay * p - alpha / (1 - b1**t) * m / denominator

        v = jax.tree.map(second, grads, state.v)
        return jax.tree.map(step, params, m, v), AdamState(state.count + 1, _stored(m, light), v)

    return optax.GradientTransformation(init, update)


def centred(rows: int) -> optax.GradientTransformation:
    """Takes their mean from the first `rows` rows of each update. What all rows of the head share, it adds to every
    logit alike, which the softmax does not see; AdamW's equal steps of many rare rows make it large
    (mu-centering: arXiv 2601.02031)."""

    def update(updates, params=None):
        return jax.tree.map(lambda u: u.at[:rows].add(-u[:rows].mean(axis=0)), updates)

    return optax.stateless(update)


def _stored(tree, light: bool):
    """First moments as they are kept between steps."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if light and x.ndim == 2 else x, tree)


# -------------------------------------------------------------------------------------------------- Muon


def _frobenius(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))


def orthogonalize(x: jax.Array, coefficients, safety: float, eps: float) -> jax.Array:
    """Approximately the polar factor of x (..., m, n), by odd polynomials that push all singular values towards 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x / (_frobenius(x).astype(x.dtype) * safety + eps)
    for a, b, c in coefficients:
        xt = jnp.swapaxes(x, -1, -2)
        gram = matmul(xt, x) if tall else matmul(x, xt)
        poly = b * gram + c * matmul(gram, gram)
        x = a * x + (matmul(x, poly) if tall else matmul(poly, x))
    return x


def _equilibrate(x):
    """Every row scaled to the mean row norm, so that the spectrum starts better conditioned."""
    rows = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True))
    target = _frobenius(x) / math.sqrt(x.shape[-2])
    return x * (target / jnp.maximum(rows, 1e-6)).astype(x.dtype)


def _normuon(x, second):
    """NorMuon: x over the root of its rows' (columns', if wide) second moment, with x's Frobenius norm."""
    axis = -1 if x.shape[-2] >= x.shape[-1] else -2
    mean = jnp.mean(jnp.square(x), axis=axis, keepdims=True)
    second = second + (1 - NORMUON_BETA2) * (mean - second)
    scale = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    size = x.shape[axis]
    before = jnp.sqrt(jnp.sum(mean, axis=(-2, -1), keepdims=True) * size)
    after = jnp.sqrt(jnp.sum(mean * size * jnp.square(scale), axis=(-2, -1), keepdims=True))
    return x * scale * (before / jnp.maximum(after, 1e-10)), second


class MuonState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # as in AdamState
    momentum: optax.Updates
    second: optax.Updates  # (rows, 1) or (1, columns) of each matrix


def muon(
    rate: float, schedules: Schedules, orth_dtype, arch: str, mesh=None, light: bool = False
) -> optax.GradientTransformation:
    """Muon over a tree of matrices; those of one shape are stacked and orthogonalised as one batch.

    On a mesh every device orthogonalises its share of whole matrices, so that the products need no communication.
    light: the momentum is kept in bfloat16.
    """

    def init(params):
        def factor(p):
            return jnp.zeros((p.shape[0], 1) if p.shape[0] >= p.shape[1] else (1, p.shape[1]), jnp.float32)

        momentum = optax.tree.zeros_like(params, jnp.float32)
        return MuonState(jnp.zeros((), jnp.int32), _stored(momentum, light), jax.tree.map(factor, params))

    def direction(x, second):
        """Nesterov momentum (..., m, n) to the update's direction in float32, and the second moment after it."""
        if arch == "classic":
            return orthogonalize(x, NEWTON_SCHULZ, 1.0, 1e-7).astype(jnp.float32), second
        x = orthogonalize(_equilibrate(x), POLAR_EXPRESS, 1.01, 1e-6).astype(jnp.float32)
        x = x * (math.sqrt(min(x.shape[-2:])) / jnp.maximum(_frobenius(x), 1e-6))
        return _normuon(x, second)

    def update(grads, state, params):
        mu, lr, wd = (f(state.count) for f in (schedules.momentum, schedules.lr, schedules.weight_decay))
        momentum = jax.tree.map(lambda m, g: m + (1 - mu) * (g - m), state.momentum, grads)
        nesterov = jax.tree.map(lambda g, m: g + mu * (m - g), grads, momentum)
        named, tree = jax.tree_util.tree_flatten_with_path(nesterov)
        kinds = [(x.shape, sharding.state_spec(path, x.shape, mesh) if mesh is not None else None) for path, x in named]
        second, p = jax.tree.leaves(state.second), jax.tree.leaves(params)
        out, moments = list(p), list(second)  # each is replaced
        for kind in sorted(set(kinds), key=str):
            members, (shape, split) = [i for i, k in enumerate(kinds) if k == kind], kind
            stacked = jnp.stack([named[i][1] for i in members]).astype(orth_dtype)
            moment = jnp.stack([second[i] for i in members])
            x, moment = sharding.over_matrices(direction, split, mesh)(stacked, moment)
            scaled = rate * lr * math.sqrt(max(1.0, shape[0] / shape[1]))
            for place, i in enumerate(members):
                moments[i] = moment[place]
                # cautious weight decay: only of elements that the update does not push outwards
                out[i] = -scaled * (x[place] + wd * p[i] * (x[place] * p[i] >= 0))
        return tree.unflatten(out), MuonState(state.count + 1, _stored(momentum, light), tree.unflatten(moments))

    return optax.GradientTransformation(init, update)


# ------------------------------------------------------------------------------------------ the whole model

# group -> (betas, decoupled decay) of the modern recipe
_ADAMW = {
    "lm_head": ((0.8, 0.96), 0.01),
    "wte": ((0.8, 0.995), 0.001),
    "value_embeds": ((0.8, 0.995), 0.01),
    "resid": ((0.8, 0.95), 0.05),
    "x0": ((0.96, 0.95), 0.0),
    "smear": ((0.8, 0.95), 0.0),
    "muon": ((0.9, 0.95), 0.1),  # where the matrices are AdamW's
}
# the first name of a parameter's path -> its group, where that is named otherwise
_GROUP_OF = {
    "blocks": "muon",
    "bigrams": "value_embeds",
    "resid_scalars": "resid",
    "x0_scalars": "x0",
    **dict.fromkeys(("smear_gate", "smear_lambda", "backout_lambda"), "smear"),
}


def group(path) -> str:
    name = str(getattr(path[0], "key", path[0]))
    return _GROUP_OF.get(name, name)


def rates(gpt: GPTConfig, cfg: OptimConfig, batch_tokens: int) -> dict[str, float]:
    """Peak rate by group, at a batch of `batch_tokens`; Muon's before the factor sqrt(max(1, out / in))."""
    b = 1.0 if gpt.init == "classic" else (batch_tokens / REFERENCE_BATCH) ** cfg.batch_power
    d = (gpt.n_embd / REFERENCE_WIDTH) ** -0.5
    peak = {
        "lm_head": cfg.unembedding_lr * b * d,
        "wte": cfg.embedding_lr * b * d,
        "value_embeds": 0.5 * cfg.embedding_lr * b * d,
        "resid": 0.01 * cfg.scalar_lr * b,
        "x0": cfg.scalar_lr * b,
        "smear": 0.4 * cfg.scalar_lr,
        "muon": cfg.matrix_lr * b,
    }
    return {name: cfg.lr_scale * rate for name, rate in peak.items()}


def make_optimizer(
    gpt: GPTConfig,
    cfg: OptimConfig,
    schedules: Schedules,
    batch_tokens: int,
    orth_dtype=jnp.float32,
    mesh=None,
    light: bool = False,
) -> optax.GradientTransformation:
    """The recipe's optimizer for the parameters of `model.GPT` as a nested dict.

    mesh: where the gradients come split as `sharding.state_spec` says; None on one device. light: moments of tables and
    matrices in fewer bytes.
    """
    peak, classic = rates(gpt, cfg, batch_tokens), gpt.init == "classic"
    muons = muon(peak["muon"], schedules, orth_dtype, gpt.init, mesh, light)
    parts = {} if cfg.matrices == "adamw" else {"muon": muons}
    for name, modern in _ADAMW.items():
        if name in parts:
            continue
        betas, decay = ((0.8, 0.95), 0.0) if classic else modern
        if name == "muon" and cfg.weight_decay is not None:
            decay = cfg.weight_decay
        parts[name] = adamw(peak[name], betas, decay, schedules.lr, light)
        if name == "lm_head" and cfg.centred_head:
            parts[name] = optax.chain(parts[name], centred(gpt.vocab_size))
    joined = optax.partition(parts, lambda params: jax.tree_util.tree_map_with_path(lambda p, _: group(p), params))
    return optax.chain(optax.clip_by_global_norm(1.0), joined) if classic else joined

"""What RL maximises, and the weight that it gives each sampled token.

Of a token with advantage A, log-probability log p now, log p_old when it was sampled, and log p_ref under the model
that RL began with, the loss is

    - min(r A, clip(r, 1 - clip, 1 + clip_high) A) + kl (q - log q - 1),    r = p / p_old,  q = p_ref / p.

The ratio and its clipping: PPO, arXiv 1707.06347. The KL's estimator, and advantages divided by their question's
standard deviation (rl.zscore): GRPO in DeepSeekMath, arXiv 2402.03300. An upper bound of its own: DAPO, arXiv
2503.14476. Without clip the ratio is free; at the first update of a step it is 1, and the gradient REINFORCE's.

The loss depends on the parameters through the tokens' log-probabilities alone, so its gradient is that of a weighted
negative log-likelihood, with d loss / d nll as the weights: a pass gives the log-probabilities, `weigh` the weights,
and the train step of the other stages does the rest. Probabilities are those of the whole softmax at temperature 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanochat_jax import sharding
from nanochat_jax.loss import token_nll
from nanochat_jax.model import cast_matrices, merge


def make_log_probs(graph, dtype, mesh) -> Callable:
    """f(params, tokens, targets (A, R, T)) -> -log p of the targets, and the entropy at each place: float32, in nats.

    Jitted; micro-batch by micro-batch, with the products of the train step.
    """

    def of_rows(params, rows):
        tokens, targets = rows
        model = merge(graph, params)
        head, cfg = params["lm_head"]["weight"], model.cfg
        found = token_nll(model.hidden(tokens), head, targets, vocab=cfg.vocab_size, softcap=cfg.softcap, entropy=True)
        return found[0], found[2]

    def local(params, *batch):
        return jax.lax.map(functools.partial(of_rows, params), batch)

    return jax.jit(lambda params, *batch: sharding.each_row(local, mesh)(cast_matrices(params, dtype), *batch))


def make_look(log_probs: Callable) -> Callable:
    """f(params, reference, batch) -> -log p of the targets under both, and mean entropy and KL over what was sampled.

    One program. reference: parameters, or None for neither its log-probabilities nor the KL. batch: tokens, targets and
    share (A, R, T).
    """

    @jax.jit
    def look(params, reference, batch):
        rows, share = (batch["tokens"], batch["targets"]), batch["share"]
        old, entropy = log_probs(params, *rows)
        metrics, kept = {"entropy": mean(entropy, share)}, None
        if reference is not None:
            kept, _ = log_probs(reference, *rows)
            metrics["kl"] = mean(estimated_kl(old, kept), share)
        return old, kept, metrics

    return look


def estimated_kl(nll, reference):
    """Of each token q - log q - 1 with q = p_ref / p: never negative, and KL(p, p_ref) in the mean over samples."""
    log_q = nll - reference
    return jnp.exp(log_q) - log_q - 1.0


def token_loss(nll, old, reference, weights, share, *, kl: float, clip: tuple[float, float] | None):
    """The loss of each token, and whether clipping took its gradient.

    All float32 arrays of one shape. nll, old, reference: -log p of now, of when it was sampled, of the reference (None
    where kl is 0); weights: advantages times share, the token's part of the mean over all tokens. clip: the ratio's
    bounds.
    """
    ratio = jnp.exp(old - nll)
    gain, clipped = weights * ratio, jnp.zeros(nll.shape, bool)
    if clip is not None:
        bounded = weights * jnp.clip(ratio, *clip)
        gain, clipped = jnp.minimum(gain, bounded), bounded < gain
    penalty = kl * share * estimated_kl(nll, reference) if kl else 0.0
    return penalty - gain, clipped


@functools.partial(jax.jit, static_argnames=("kl", "clip"))
def weigh(nll, old, reference, weights, share, *, kl: float, clip: tuple[float, float] | None):
    """d token_loss / d nll, by which the train step weighs each token's nll; and the share of clipped tokens."""

    def total(nll):
        loss, clipped = token_loss(nll, old, reference, weights, share, kl=kl, clip=clip)
        return loss.sum(), clipped

    found, clipped = jax.grad(total, has_aux=True)(nll)
    return found, mean(clipped, share)


def mean(values, share):
    """The mean over the sampled tokens, those with a share."""
    sampled = share > 0
    return jnp.where(sampled, values, 0).sum() / jnp.maximum(sampled.sum(), 1)

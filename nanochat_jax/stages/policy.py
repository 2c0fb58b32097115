"""The loss of RL, and the weight that it gives each sampled token.

Of a token with advantage A, log-probability log p now, log p_old when it was sampled, and log p_ref under the model
that RL began with, the loss is

    - min(r A, clip(r, 1 - clip, 1 + clip_high) A) + kl (q - log q - 1),    r = p / p_old,  q = p_ref / p.

The ratio and its clipping: PPO, arXiv 1707.06347. The KL's estimator, and advantages divided by their question's
standard deviation (rl.zscore): GRPO in DeepSeekMath, arXiv 2402.03300. An upper bound of its own: DAPO, arXiv
2503.14476. Without clip the ratio is free; at the first update of a step it is 1, and the gradient REINFORCE's.

With rl.objective=dpo the loss is that of pairs of answers instead, `preference_loss`.

Both depend on the parameters only through the tokens' log-probabilities, so that the gradient is that of a negative
log-likelihood weighted by d loss / d nll: a forward pass gives the log-probabilities, `weigh` the weights, and the
train step of the other stages does the rest. Probabilities are those of the whole softmax at rl.temperature, from which
the samples are. rl.top_k, which leaves out the least likely tokens, is not in them: what looks at ratios of
probabilities, rl.kl, rl.clip and further updates of the same samples, needs rl.top_k=0 (`rules.py`). The plain policy
gradient takes samples of the top 50 for those of all, as the reference does.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanochat_jax.config import RLConfig
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import cast_matrices, merge
from nanochat_jax.model.loss import tempered, token_nll


def make_log_probs(graph, dtype, mesh, temperature: float = 1.0) -> Callable:
    """f(params, tokens, targets (A, R, T)) -> -log p of the targets, and the entropy at each place: float32, in nats.

    Of the softmax at a temperature. Jitted; micro-batch by micro-batch, with the products of the train step.
    """

    def of_rows(params, rows):
        tokens, targets = rows
        model = merge(graph, params)
        head, cfg = params["lm_head"]["weight"], model.cfg
        hidden, softcap = tempered(model.hidden(tokens), cfg.softcap, temperature)
        found = token_nll(hidden, head, targets, vocab=cfg.vocab_size, softcap=softcap, entropy=True)
        return found[0], found[2]

    def local(params, *batch):
        return jax.lax.map(functools.partial(of_rows, params), batch)

    return jax.jit(lambda params, *batch: sharding.each_row(local, mesh)(cast_matrices(params, dtype), *batch))


def make_look(log_probs: Callable, on_policy: bool = True) -> Callable:
    """f(params, reference, batch) -> -log p of the targets under both, and mean entropy and KL over sampled tokens.

    reference: parameters, or None for neither its log-probabilities nor the KL. on_policy: whether the samples are of
    params, which the estimate of the KL assumes. batch: tokens, targets and share (A, R, T).
    """

    @jax.jit
    def look(params, reference, batch):
        rows, share = (batch["tokens"], batch["targets"]), batch["share"]
        old, entropy = log_probs(params, *rows)
        metrics, kept = {"entropy": mean(entropy, share)}, None
        if reference is not None:
            kept, _ = log_probs(reference, *rows)
            if on_policy:
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


def preference_loss(nll, reference, signs, beta: float):
    """DPO's loss, arXiv 2305.18290, in the mean over pairs; and how well right and wrong are told apart.

    nll, reference: -log p (A, R, T) of now and of the model that RL began with. Of the A * R rows each two are a
    question's right answer, whose tokens have a positive sign, and a wrong one, negative; 0 where nothing was sampled
    or the question has no pair.
    """
    signs = jnp.sign(signs).reshape(-1, 2, nll.shape[-1])
    margins = beta * (signs * (reference - nll).reshape(signs.shape)).sum(axis=(1, 2))
    is_pair = jnp.any(signs != 0, axis=(1, 2))
    count = jnp.maximum(is_pair.sum(), 1)
    loss = -jnp.where(is_pair, jax.nn.log_sigmoid(margins), 0.0).sum() / count
    metrics = {"margin": margins.sum() / count, "preferred": (is_pair & (margins > 0)).sum() / count}
    return loss, {"loss": loss, **metrics}


def make_weigh(cfg: RLConfig) -> Callable:
    """f(nll, batch) -> d loss / d nll, by which the train step weighs each token's nll, and metrics; jitted.

    nll (A, R, T) of now; batch: old, reference, weights and share alike, as `token_loss` and `preference_loss` say.
    """
    clip = None
    if cfg.clip is not None:
        clip = 1.0 - cfg.clip, 1.0 + (cfg.clip if cfg.clip_high is None else cfg.clip_high)

    def grpo(nll, batch):
        fixed = (batch[k] for k in ("old", "reference", "weights", "share"))
        loss, clipped = token_loss(nll, *fixed, kl=cfg.kl or 0.0, clip=clip)
        return loss.sum(), {} if clip is None else {"clip_fraction": mean(clipped, batch["share"])}

    def dpo(nll, batch):
        return preference_loss(nll, batch["reference"], batch["weights"], cfg.beta)

    return jax.jit(jax.grad({"grpo": grpo, "dpo": dpo}[cfg.objective], has_aux=True))


def mean(values, share):
    """The mean over the sampled tokens, those with a share."""
    sampled = share > 0
    return jnp.where(sampled, values, 0).sum() / jnp.maximum(sampled.sum(), 1)

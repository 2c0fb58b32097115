"""RL: what of a rollout is learned and how much, and pass@k."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.engine import Completion
from nanochat_jax.loss import weighted_nll
from nanochat_jax.stages.common import mix_seed
from nanochat_jax.stages.rl import Rollouts, pass_at_k, training_batch

END, PAD = 9, 0


def rollouts():
    """Two questions of two samples: a stop, a length, a tool's token, a sample of nothing."""
    completions = [
        [Completion([5, 6], [1, 1], "stop"), Completion([5, 7, 8], [1, 0, 1], "length")],
        [Completion([4], [1], "stop"), Completion([], [], "stop")],
    ]
    return Rollouts([[1, 2, 3], [1, 3]], completions, np.array([[1.0, 0.0], [0.0, 0.0]], np.float32))


def test_training_batch_masks_prompts_tools_and_padding():
    batch = training_batch(rollouts(), END, PAD, max_len=256)
    assert batch["tokens"].shape == (4, 64)  # of few lengths, so that few programs are compiled
    want = [
        [-1, -1, 5, 6, END, -1],
        [-1, -1, 5, -1, 8, -1],
        [-1, 4, END, -1, -1, -1],
        [-1, END, -1, -1, -1, -1],
    ]
    assert batch["targets"][:, :6].tolist() == want and (batch["targets"][:, 6:] == -1).all()
    assert batch["tokens"][1, :6].tolist() == [1, 2, 3, 5, 7, 8]
    # advantage over the 5 sampled tokens of the question, times 1 / 2 questions
    weights = batch["weights"]
    assert np.allclose(weights[0][batch["targets"][0] >= 0], 0.5 / 5 / 2)
    assert np.allclose(weights[1][batch["targets"][1] >= 0], -0.5 / 5 / 2)
    assert (weights[2:] == 0).all() and (weights[batch["targets"] < 0] == 0).all()


def test_training_batch_crops_to_the_context():
    batch = training_batch(rollouts(), END, PAD, max_len=4)
    assert batch["tokens"].shape == (4, 4) and batch["targets"][0].tolist() == [-1, -1, 5, 6]


def test_the_gradient_is_that_of_the_policy_gradient():
    """d/dh of sum(weights * nll) = -1/Q sum_q 1/n_q sum_samples A sum_t d log p: REINFORCE with a baseline."""
    data, rng = rollouts(), np.random.default_rng(0)
    batch = training_batch(data, END, PAD, max_len=4)
    head = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(4, 4, 8)), jnp.float32)

    def ours(h):
        return weighted_nll(h, head, batch["targets"], batch["weights"], vocab=16, softcap=15.0)

    def plainly(h):
        logp = jax.nn.log_softmax(15.0 * jnp.tanh(h @ head.T / 15.0), axis=-1)
        total, sampled = 0.0, batch["targets"] >= 0
        for q, s in itertools.product(range(2), range(2)):
            row, group = 2 * q + s, sampled[2 * q : 2 * q + 2]
            advantage = data.rewards[q, s] - data.rewards[q].mean()
            places = np.flatnonzero(sampled[row])
            total -= advantage * logp[row, places, batch["targets"][row, places]].sum() / group.sum() / 2
        return total

    got, want = jax.grad(ours)(hidden), jax.grad(plainly)(hidden)
    assert np.allclose(got, want, atol=1e-7) and np.abs(want).max() > 1e-3


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    rewards = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], np.float32)
    got = pass_at_k(rewards)
    assert set(got) == {"pass@1", "pass@2", "pass@4"}
    for k in (1, 2, 4):
        want = np.mean([[max(row[list(c)]) for c in itertools.combinations(range(4), k)] for row in rewards])
        assert got[f"pass@{k}"] == pytest.approx(want)


def test_seeds_differ_by_every_number_and_place():
    seeds = {mix_seed(*numbers) for numbers in itertools.product(range(6), range(6), range(6))}
    assert len(seeds) == 216 and mix_seed(1, 2) != mix_seed(2, 1) and all(0 <= s < 2**31 for s in seeds)

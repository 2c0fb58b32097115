"""RL: which questions are asked, what of a rollout is learned and how much, and pass@k. The stage: test_rl_stage.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evals_fakes import tiny_model
from flax import nnx

from evals.tasks.plain import Arithmetic
from nanochat_jax.config import MeshConfig, RLConfig
from nanochat_jax.engine.engine import Completion
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import graph_of, merge
from nanochat_jax.model.loss import token_nll, weighted_nll
from nanochat_jax.stages import policy
from nanochat_jax.stages.common import mix_seed, permutation
from nanochat_jax.stages.rollouts import (
    TOO_LONG,
    Question,
    Questions,
    Rollouts,
    advantages,
    minibatches,
    pairs,
    pass_at_k,
    training_batch,
)
from nanochat_jax.stages.step import place
from nanochat_jax.training import loop

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
    assert batch["tokens"].shape == (4, 128)  # of few lengths, so that few programs are compiled
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
    assert (
        np.allclose(batch["share"].reshape(2, -1).sum(axis=1), 1 / 2)
        and (batch["share"][batch["targets"] < 0] == 0).all()
    )


def test_a_question_that_was_skipped_weighs_nothing_and_takes_nothing_from_the_others():
    asked, skipped = rollouts(), Completion([], [], TOO_LONG)
    both = Rollouts([*asked.prompts, [1] * 300], [*asked.completions, [skipped] * 2], np.zeros((3, 2), np.float32))
    both.rewards[:2] = asked.rewards
    whole, batch = (training_batch(r, END, PAD, max_len=64) for r in (asked, both))
    assert all(np.array_equal(batch[k][:4], whole[k]) for k in ("weights", "share", "targets"))
    assert (batch["targets"][4:] == -1).all() and not batch["share"][4:].any()
    questions = [Question(Short("a", 3), i, i) for i in range(3)]
    counted = both.metrics(questions)
    assert counted == asked.metrics(questions[:2]) | {"skipped": 1} and counted["reward"] == 0.25
    assert (training_batch(pairs(both), END, PAD, max_len=64)["weights"][4:] == 0).all()
    none = Rollouts([[1] * 300], [[skipped] * 2], np.zeros((1, 2), np.float32))
    assert none.metrics(questions[:1])["reward"] == 0 and not training_batch(none, END, PAD, 64)["weights"].any()


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


def test_advantages_are_over_their_deviation_where_there_is_one():
    rewards = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    assert np.allclose(advantages(rewards, False), [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])
    scored = advantages(rewards, True)
    assert (
        np.allclose(scored[0].std(), 1) and np.allclose(scored[0, 0], 0.75 / np.sqrt(3 / 16)) and (scored[1] == 0).all()
    )


def test_a_minibatch_is_weighed_as_if_it_were_the_whole():
    whole = training_batch(rollouts(), END, PAD, max_len=256)
    first, second = minibatches(whole, 2)
    alone = rollouts()
    alone = training_batch(Rollouts(alone.prompts[:1], alone.completions[:1], alone.rewards[:1]), END, PAD, max_len=256)
    assert all(np.array_equal(first[k], alone[k]) for k in alone)
    assert np.array_equal(second["tokens"], whole["tokens"][2:])
    assert all(np.array_equal(minibatches(whole, 1)[0][k], whole[k]) for k in whole)


# ------------------------------------------------------------------------------------------------ the objective

KL, CLIP = 0.3, (0.2, 0.25)


@pytest.fixture(scope="module")
def tiny():
    """The parts of a small model, a batch (1, 4, 16), and by temperature the pass and a train step of plain gradient
    descent."""
    model = tiny_model(sequence_len=16, vocab_size=50)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 50, (1, 4, 17)).astype(np.int32)
    sampled = rng.random((1, 4, 16)) < 0.6
    share = sampled / sampled.sum()
    batch = {
        "tokens": tokens[..., :-1],
        "targets": np.where(sampled, tokens[..., 1:], -1),
        "weights": (rng.normal(size=(1, 4, 1)) * share).astype(np.float32),
        "share": share.astype(np.float32),
    }
    graph, mesh, descent = (
        graph_of(model.cfg, jnp.float32),
        sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
        optax.sgd(1.0),
    )
    programs = {
        t: (
            policy.make_log_probs(graph, jnp.float32, mesh, t),
            loop.make_step(graph, descent, jnp.float32, mesh, temperature=t),
        )
        for t in (1.0, 0.6)
    }
    return graph, nnx.to_pure_dict(nnx.split(model)[1]), batch, programs


def moved(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + 0.03 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def written_out(graph, params, old, reference, batch, kl, clip, temperature):
    """PPO's clipped gain less GRPO's penalty, token by token, from whole log-softmaxes at a temperature."""
    targets, sampled = jnp.maximum(batch["targets"][0], 0), batch["targets"][0] >= 0

    def log_p(params):
        logp = jax.nn.log_softmax(merge(graph, params)(batch["tokens"][0]) / temperature, axis=-1)
        return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    now = log_p(params)
    ratio = jnp.exp(now - log_p(old))
    gain, weights = ratio * batch["weights"][0], batch["weights"][0]
    if clip:
        low, high = 1 - clip[0], 1 + clip[1]
        gain = jnp.where(weights > 0, jnp.minimum(ratio, high) * weights, jnp.maximum(ratio, low) * weights)
    q = jnp.exp(log_p(reference) - now)
    penalty = (kl or 0) * batch["share"][0] * (q - jnp.log(q) - 1)
    return -jnp.where(sampled, gain - penalty, 0.0).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("kl", "clip"), [(None, None), (KL, CLIP)])
def test_weighed_nll_has_the_gradient_of_the_objective(tiny, kl, clip, temperature):
    """Through the train step itself, from log-probabilities of the pass."""
    graph, params, batch, programs = tiny
    log_probs, step = programs[temperature]
    old, reference = moved(params, 1), moved(params, 2)
    nll, before, kept = (log_probs(p, batch["tokens"], batch["targets"])[0] for p in (params, old, reference))
    settings = RLConfig(kl=kl, clip=clip and clip[0], clip_high=clip and clip[1])
    weights, found = policy.make_weigh(settings)(nll, {**batch, "old": before, "reference": kept})
    assert not clip or 0.1 < found["clip_fraction"] < 0.9, "some are beyond the bounds"
    state = loop.TrainState(jax.tree.map(jnp.copy, params), optax.sgd(1.0).init(params), jnp.int32(0))
    rows = {"tokens": batch["tokens"], "targets": batch["targets"], "weights": weights}
    after = step(state, rows)[0].params
    got = jax.tree.map(jnp.subtract, params, after)
    objective = jax.jit(functools.partial(written_out, graph, kl=kl, clip=clip, temperature=temperature))
    want = jax.grad(objective)(params, old, reference, batch)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.allclose(g, w, atol=2e-5 * max(1, float(jnp.abs(w).max())))
    assert max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want)) > 1e-2


@pytest.mark.parametrize("clip", [None, 0.2])
def test_at_the_first_update_the_weights_are_the_advantages_bit_for_bit(tiny, clip):
    batch = tiny[2]
    nll = np.random.default_rng(0).exponential(2, batch["weights"].shape).astype(np.float32)
    weights, found = policy.make_weigh(RLConfig(clip=clip))(nll, {**batch, "old": nll, "reference": None})
    assert np.array_equal(weights, batch["weights"]) and found == ({"clip_fraction": 0} if clip else {})


def test_dpo_is_the_sigmoid_loss_of_pairs_and_its_weights_are_their_gradient():
    """Of whole answers, summed over tokens; a question without a pair, and tokens not sampled, count for nothing."""
    rng = np.random.default_rng(0)
    nll, reference = (rng.exponential(1, (2, 3, 5)).astype(np.float32) for _ in range(2))
    signs = rng.integers(0, 2, (3, 2, 5)) * np.array([[[0.1], [-0.1]], [[0], [0]], [[0.2], [-0.3]]])
    batch = {"weights": signs.reshape(2, 3, 5).astype(np.float32), "reference": reference}

    def plainly(nll):
        total = 0.0
        for pair in (0, 2):
            ratios = [((reference - nll).reshape(6, 5)[2 * pair + i] * (signs[pair, i] != 0)).sum() for i in (0, 1)]
            total -= jnp.log(jax.nn.sigmoid(0.3 * (ratios[0] - ratios[1])))
        return total / 2

    loss, want = jax.value_and_grad(plainly)(nll)
    got, found = policy.make_weigh(RLConfig(objective="dpo", beta=0.3))(nll, batch)
    assert np.allclose(got, want, atol=1e-7) and np.isclose(found["loss"], loss) and np.abs(want).max() > 0.01
    level, at_start = policy.make_weigh(RLConfig(objective="dpo"))(reference, batch)
    assert np.isclose(at_start["loss"], np.log(2)) and at_start["preferred"] == at_start["margin"] == 0


def test_pairs_are_a_right_and_a_wrong_answer():
    said = [[Completion([10 * q + s], [1], "stop") for s in range(3)] for q in range(3)]
    found = pairs(Rollouts([[1], [2], [3]], said, np.array([[0, 0, 1], [1, 1, 1], [1, 0, 0]], np.float32)))
    assert [[c.ids for c in g] for g in found.completions] == [[[2], [0]], [[10], [10]], [[20], [21]]]
    assert found.rewards.tolist() == [[1, 0], [1, 1], [1, 0]]
    assert (training_batch(found, END, PAD, 64)["weights"][2:4] == 0).all()


def test_entropy_is_that_of_the_softmax_and_the_kl_is_right_in_the_mean():
    rng = np.random.default_rng(0)
    head, hidden = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 8), (3, 5, 8)))
    logp = jax.nn.log_softmax(15.0 * jnp.tanh(hidden @ head.T / 15.0)[..., :13], axis=-1)
    _, _, entropy = token_nll(hidden, head, jnp.zeros((3, 5), jnp.int32), vocab=13, softcap=15.0, chunk=4, entropy=True)
    assert np.allclose(entropy, -(jnp.exp(logp) * logp).sum(-1), atol=1e-5)
    p, other = logp[0, 0], logp[0, 1]
    estimate = (jnp.exp(p) * policy.estimated_kl(-p, -other)).sum()  # over all tokens, each as often as it is drawn
    assert np.isclose(estimate, (jnp.exp(p) * (p - other)).sum(), rtol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(4, 2, 1), MeshConfig(2, 2, 2)])
def test_log_probabilities_on_eight_devices_are_those_of_one(mesh):
    model = tiny_model(sequence_len=16, vocab_size=64)
    graph, params = graph_of(model.cfg, jnp.float32), nnx.to_pure_dict(nnx.split(model)[1])
    tokens = np.random.default_rng(0).integers(0, 64, (16, 17)).astype(np.int32)
    found = []
    for m in (sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), sharding.make_mesh(mesh)):
        rows = place({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, 2, m)
        put = jax.device_put(params, sharding.tree_shardings(params, m))
        found.append(policy.make_log_probs(graph, jnp.float32, m)(put, rows["tokens"], rows["targets"]))
    for one, many in zip(*found, strict=True):
        assert one.shape == (2, 8, 16) and np.allclose(one, many, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the questions


class Short(Arithmetic):
    def __init__(self, name, size):
        super().__init__("train", size)
        self.name = name


def test_one_task_is_gone_through_epoch_by_epoch():
    questions = Questions({"a": Short("a", 10)}, {"a": 1}, seed=7)
    assert len(questions) == 10
    got = [questions[i].index for i in range(25)]
    assert got == [*permutation(7, 0, 10), *permutation(7, 1, 10), *permutation(7, 2, 10)[:5]]
    assert [questions[i].index for i in (24, 3, 12)] == [got[24], got[3], got[12]]  # of the place alone


def test_tasks_are_mixed_by_their_shares():
    tasks = {"a": Short("a", 12), "b": Short("b", 5)}
    questions = Questions(tasks, {"a": 3, "b": 1}, seed=7)
    asked = [questions[i] for i in range(16)]
    assert [q.task.name for q in asked] == ["a", "a", "a", "b"] * 4
    assert sorted(q.index for q in asked if q.task.name == "a") == list(range(12))
    assert len(questions) == 16 and len({q.id for q in asked}) == 16
    assert all(q.id == q.index + (12 if q.task.name == "b" else 0) for q in asked)


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

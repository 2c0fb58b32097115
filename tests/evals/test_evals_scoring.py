"""Scorer against the full logits: single texts, texts that share their beginning, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evals_fakes import FullLogits, tiny_model
from flax import nnx

from evals import branches, scoring
from evals.scoring import Scorer, crop_left
from nanochat_jax.config import MeshConfig
from nanochat_jax.mesh import sharding

CLASSIC = {
    **dict.fromkeys(("residual_scalars", "value_embeds", "smear", "backout"), False),
    **{"window_pattern": "L", "bigram_rows": 0, "key_offset": False, "head_values": False},
}


@pytest.fixture(scope="module", autouse=True)
def few_buckets():
    """As on an accelerator: a test waits for compiling and for nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CPU", scoring.CPU._replace(steps=scoring.ACCELERATOR.steps))
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, batch_rows=4)


def sequences(lengths, seed=0, vocab=265):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def full(model):
    return FullLogits(model)


def whole(ids):
    """A question of one text of which everything is a target."""
    return [(ids, 1, len(ids))]


def check(full, answers, scores, tolerance=1e-5):
    """Scores of a question against the full forward of each text by itself."""
    for (ids, start, end), got in zip(answers, scores, strict=True):
        np.testing.assert_allclose(got.nll, full.nll(ids)[start - 1 : end - 1], rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(got.best, full(ids).argmax(-1)[start - 1 : end - 1])


def test_losses_of_single_texts_come_in_the_given_order(full, scorer):
    given = [whole(ids) for ids in sequences([90, 2, 70, 192, 100])]
    for answers, got in zip(given, scorer.token_losses(given), strict=True):
        check(full, answers, got)


def test_spans_select_targets(full, scorer):
    long, short = sequences([40, 7])
    given = [[(long, 10, 13)], [(short, 6, 7)]]
    for answers, got in zip(given, scorer.token_losses(given), strict=True):
        check(full, answers, got)


def test_long_texts_are_cropped_at_the_left(full, scorer):
    (ids,) = sequences([300])
    ((got,),) = scorer.token_losses([[(ids, 290, 300)]])
    np.testing.assert_allclose(got.nll, full.nll(ids[-192:])[-10:], rtol=2e-4, atol=2e-5)
    ((got,),) = scorer.token_losses([[(ids, 50, 300)]])
    assert len(got.nll) == 191  # the span began before the crop: all that is left of it, but the first token
    assert crop_left([(list(range(10)), 3, 9), (list(range(8)), 6, 8)], 5) == [
        ([5, 6, 7, 8, 9], 1, 4),
        ([5, 6, 7], 1, 3),
    ]
    assert crop_left([([1, 2, 3], 1, 3)], 5) == [([1, 2, 3], 1, 3)]


def test_a_long_question_still_shares_its_beginning(full, scorer):
    rng = np.random.default_rng(6)
    answers = question(rng, 230, (4, 9, 2))
    cut = [(ids[239 - 192 :], s - 47, e - 47) for ids, s, e in answers]
    assert len(branches.grow(crop_left(answers, 192)).tokens) == 1 + 3 + 8 + 1
    check(full, cut, scorer.token_losses([answers])[0])


def test_last_logits_of_candidates(full, scorer):
    given = sequences([3, 100, 250, 17, 9])
    candidates = [[65, 66, 67], [1], [3, 2], [250, 0, 9, 8], [7, 7]]
    for ids, wanted, got in zip(given, candidates, scorer.last_logits(given, candidates), strict=True):
        np.testing.assert_allclose(got, full(ids[-192:])[-1][wanted], rtol=2e-4, atol=2e-4)


def test_row_losses_ignore_negative_targets(full, scorer):
    rows = np.array(sequences([65, 65]))
    targets = rows[:, 1:].copy()
    targets[1, 5:] = -1
    got = scorer.row_losses(rows[:, :-1], targets)
    np.testing.assert_allclose(got[0], full.nll(rows[0].tolist()), rtol=2e-4, atol=2e-5)
    assert (got[1, 5:] == 0).all() and (got[1, :5] > 0).all()


def test_nothing_to_score(scorer):
    assert scorer.token_losses([]) == [] and scorer.last_logits([], []) == []
    ((got,),) = scorer.token_losses([[([5], 1, 1)]])
    assert len(got.nll) == 0  # one token has no target
    with pytest.raises(ValueError, match="one token"):
        scorer.token_losses([whole([1, 2]), [([], 1, 0)]])


def test_few_programs(model):
    """Lengths within a bucket, another Scorer of the same architecture, any number of questions: one program."""
    programs = (scoring._prefixes, scoring._branch_losses)
    before = [p._cache_size() for p in programs]
    for lengths in ([41] * 7, [50, 36, 39, 60, 50], [64] * 5):
        given = [[(ids, len(ids) - 2, len(ids))] for ids in sequences(lengths)]
        Scorer(tiny_model(seed=3), batch_rows=4).token_losses(given)
    assert [p._cache_size() - n for p, n in zip(programs, before)] == [1, 1]


def test_buckets():
    for steps, some in ((1, [16, 32, 64, 128, 256]), (4, [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256])):
        sizes = [scoring.prefix_bucket(n, steps) for n in range(257)]
        assert sorted(set(sizes)) == some and all(size >= n for n, size in enumerate(sizes))
    some = (1, 2, 4, 5, 16, 17, 64, 65, 1025)
    assert [scoring.branch_bucket(n, 1) for n in some] == [1, 4, 4, 16, 16, 64, 64, 256, 4096]
    assert [scoring.branch_bucket(n, 4) for n in some] == [1, 4, 4, 16, 16, 32, 64, 128, 2048]
    assert [scoring.power_of_four(n) for n in (1, 16, 17, 65)] == [1, 16, 64, 256]


# ------------------------------------------------------------------------------------- texts that begin alike


def test_a_tree_by_hand():
    tree = branches.grow([([9, 8, 7, 1, 2], 3, 5), ([9, 8, 7, 3], 3, 4), ([9, 8, 7, 1, 2], 3, 5)])
    assert tree.prefix == (9, 8)  # of the shared beginning all but the last, which predicts
    assert tree.tokens == [7, 1] and tree.before == [8, 7] and tree.positions == [2, 3]
    assert tree.branch == [branches.STEM, 1]  # what is a target only is not computed; equal texts are one
    assert tree.sources == [0, 1, 0] and tree.targets == [1, 2, 3]
    assert tree.spans == [slice(0, 2), slice(2, 3), slice(0, 2)]
    tree = branches.grow([([5, 1, 2], 2, 3), ([6, 1, 2], 1, 3)])  # they share nothing
    assert tree.prefix == () and tree.tokens == [5, 1, 6, 1] and tree.before == [-1, 5, -1, 6]
    assert tree.branch == [1, 1, 2, 2] and tree.sources == [1, 2, 3] and tree.targets == [2, 1, 2]


def question(rng, shared, ends, first=0):
    """Texts with `shared` tokens in common and `ends` more; targets from `first` tokens behind the common ones."""
    prefix = rng.integers(0, 265, shared).tolist()
    texts = [prefix + [i, *rng.integers(0, 265, n - 1).tolist()] for i, n in enumerate(ends)]
    return [(ids, max(1, shared + first), len(ids)) for ids in texts]


def windowed(**switches):
    """A model with windows of 128 in a context of 300, every switch of the architecture on but where `switches` say."""
    made = tiny_model(sequence_len=300, bigram_rows=53, key_offset=True, head_values=True)
    made.smear_lambda[...] = jnp.asarray([0.7])
    if not switches:
        return made
    from nanochat_jax.model.gpt import GPT

    cfg = dataclasses.replace(made.cfg, **switches)
    other, params = GPT(cfg, rngs=nnx.Rngs(0)), nnx.to_pure_dict(nnx.split(made)[1])
    graph, state = nnx.split(other)
    named = jax.tree_util.tree_map_with_path(lambda path, _: _at(params, path), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, named)
    return nnx.merge(graph, state)


def _at(params, path):
    for step in path:
        params = params[step.key]
    return params


@pytest.mark.parametrize("switches", [{}, CLASSIC], ids=["modern", "classic"])
def test_shared_beginnings_at_every_boundary_of_the_window(switches):
    """Shared parts from nothing to beyond the window, branches that begin before, at and behind its edge."""
    made, rng = windowed(**switches), np.random.default_rng(1)
    full, scorer = FullLogits(made), Scorer(made, batch_rows=4)
    shared = [0, 1, 2, 3, 65, 100, *range(124, 134), 190, 192, 193, 194, 254, 255, 256]
    given = [question(rng, n, (1, 2, 7, 30)) for n in shared]
    given += [question(rng, n, (19, 2, 5, 11), first) for n, first in ((3, 1), (128, 2), (127, 0))]
    for answers, got in zip(given, scorer.token_losses(given), strict=True):
        check(full, [(ids, s, e) for ids, s, e in answers], got)


def test_beyond_the_context_layers_that_see_all_look_back_a_context(model):
    """What `limit` admits is scored as the full forward has it, and that looks back sequence_len tokens a layer."""
    (ids,) = sequences([500])
    forward = jax.jit(lambda t: model(t))
    logits = np.asarray(forward(jnp.asarray([ids]))[0], np.float64)
    want = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(499), ids[1:]]
    ((got,),) = Scorer(model, batch_rows=4).token_losses([[(ids, 480, 500)]], limit=1000)
    np.testing.assert_allclose(got.nll, want[479:], rtol=1e-5, atol=1e-5)
    last = 498 - 128 - model.cfg.sequence_len  # the first token that the last but one can know of; the smear: and one
    other = [*sequences([last - 1], seed=9)[0], *ids[last - 1 :]]
    seen = np.abs(np.asarray(forward(jnp.asarray([other]))[0]) - logits).max(axis=-1) > 0
    assert seen[: last - 1].all() and not seen[498:].any() and seen[490:498].any()


def test_equal_texts_score_equal_to_the_last_bit(scorer):
    rng = np.random.default_rng(2)
    answers = question(rng, 50, (4, 9, 4))
    answers.append(answers[1])
    (got,) = scorer.token_losses([answers])
    np.testing.assert_array_equal(got[1].nll, got[3].nll)


# ----------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_mesh_scores_as_one_device(model, scorer, sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    spread, rng = Scorer(model, batch_rows=4, mesh=mesh), np.random.default_rng(4)
    assert spread._params["lm_head"]["weight"].addressable_shards[0].data.shape == (320 // sizes[2], 32 // sizes[1])
    given = [question(rng, int(n), (2, 5, 3)) for n in rng.integers(70, 125, 21)]
    for one, many in zip(scorer.token_losses(given), spread.token_losses(given), strict=True):
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a.nll, b.nll, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(a.best, b.best)
    texts, candidates = sequences([90, 100, 110]), [[65, 66], [1], [3, 2, 9]]
    for a, b in zip(scorer.last_logits(texts, candidates), spread.last_logits(texts, candidates), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    rows = np.array(sequences([65] * 11))
    a, b = (s.row_losses(rows[:, :-1], rows[:, 1:]) for s in (scorer, spread))
    assert b.shape == (11, 64)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

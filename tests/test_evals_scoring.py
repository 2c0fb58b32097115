"""Scorer against the full logits of the model."""

import numpy as np
import pytest
from evals_fakes import FullLogits, tiny_model

from evals.scoring import Scorer, bucket, crop_left


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


def test_token_losses_equal_those_of_the_full_logits_in_the_given_order(full, scorer):
    given = sequences([5, 90, 2, 33, 190, 64, 65, 12, 192])
    for ids, got in zip(given, scorer.token_losses(given), strict=True):
        np.testing.assert_allclose(got.nll, full.nll(ids), rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(got.best, full(ids)[:-1].argmax(-1))


def test_spans_select_targets(full, scorer):
    given = sequences([40, 7])
    got = scorer.token_losses(given, [(10, 13), (6, 7)])
    np.testing.assert_allclose(got[0].nll, full.nll(given[0])[9:12], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(got[1].nll, full.nll(given[1])[5:6], rtol=2e-4, atol=2e-5)


def test_long_sequences_are_cropped_at_the_left(full, scorer):
    (ids,) = sequences([300])
    (got,) = scorer.token_losses([ids], [(290, 300)])
    np.testing.assert_allclose(got.nll, full.nll(ids[-192:])[-10:], rtol=2e-4, atol=2e-5)
    (got,) = scorer.token_losses([ids], [(50, 300)])
    assert len(got.nll) == 191  # the span began before the crop: all that is left of it, but the first token
    assert crop_left(list(range(10)), 3, 9, 5) == ([5, 6, 7, 8, 9], 1, 4)
    assert crop_left([1, 2, 3], 1, 3, 5) == ([1, 2, 3], 1, 3)


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
    (got,) = scorer.token_losses([[5]])
    assert len(got.nll) == 0  # one token has no target
    with pytest.raises(ValueError, match="one token"):
        scorer.token_losses([[1, 2], []])


def test_batches_of_one_length_and_their_number_of_programs(model, full):
    from evals import scoring

    scorer = Scorer(model, batch_rows=2)
    before = scoring._hidden._cache_size()
    given = sequences([30] * 7)
    for ids, got in zip(given, scorer.token_losses(given)):
        np.testing.assert_allclose(got.nll, full.nll(ids), rtol=2e-4, atol=2e-5)
    Scorer(tiny_model(), batch_rows=2).token_losses(sequences([20, 64]))
    assert scoring._hidden._cache_size() - before <= 1


def test_buckets():
    assert [bucket(n, 2048) for n in (1, 64, 65, 97, 129, 2000, 4000)] == [64, 64, 96, 128, 192, 2048, 2048]
    assert bucket(100, 100) == 100
    sizes = sorted({bucket(n, 2048) for n in range(1, 2049)})
    assert sizes == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]

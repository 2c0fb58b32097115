"""Standard errors and tests of differences against simulation and against what is known in closed form."""

import itertools
import math

import numpy as np
import pytest

from evals import significance


def test_mcnemar_is_the_binomial_test_of_the_questions_that_only_one_has_right():
    for only_a, only_b in itertools.product(range(7), range(7)):
        n = only_a + only_b
        tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
        assert significance.mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * tail))
    assert significance.mcnemar(3000, 4000) < 1e-30


def test_two_proportions_and_errors():
    stderr, p = significance.two_proportions(0.5, 100, 0.6, 200)
    assert stderr == pytest.approx(math.sqrt(0.25 / 100 + 0.24 / 200))
    assert p == pytest.approx(math.erfc(0.1 / math.sqrt(17 / 30 * 13 / 30 * 0.015) / math.sqrt(2)))
    assert significance.two_proportions(0.0, 10, 0.0, 20) == (0.0, 1.0)
    assert significance.by_error(1.96, 1.0) == pytest.approx(0.05, abs=1e-4)
    assert significance.by_error(2.262, 1.0, 9) == pytest.approx(0.05, abs=1e-4)  # Student's table
    assert significance.by_error(1.0, 0.0) == 0.0 and significance.by_error(0.0, 0.0) == 1.0


def test_pairs_say_more_than_two_samples():
    rng = np.random.default_rng(0)
    a = rng.normal(size=400)
    b = a + 0.1 + 0.2 * rng.normal(size=400)
    stderr, p = significance.paired(a, b)
    assert stderr == pytest.approx((b - a).std(ddof=1) / 20) and p < 1e-6
    assert significance.paired(a[:1], b[:1]) == (0.0, 1.0)  # one pair says nothing of chance


def test_the_error_of_a_ratio_is_what_repetition_shows():
    rng = np.random.default_rng(1)
    sizes = rng.integers(500, 1500, (400, 100))
    bits = 2 * sizes + 100 * rng.normal(size=sizes.shape)
    spread = (bits.sum(1) / sizes.sum(1)).std()
    errors = [significance.ratio_error(x, w) for x, w in zip(bits, sizes)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)


def test_holm_against_its_definition():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0] and significance.holm([]) == []
    rng, alarms = np.random.default_rng(2), 0
    for _ in range(500):
        alarms += min(significance.holm(rng.random(20))) < 0.05
    assert alarms / 500 < 0.08


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_choices_of_k_answers_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = np.arange(n)[None] < c
        chosen = list(itertools.combinations(right[0], k))
        assert significance.pass_at_k(right, k)[0] == pytest.approx(sum(map(any, chosen)) / len(chosen))
    with pytest.raises(ValueError, match="cannot be told"):
        significance.pass_at_k(np.ones((1, n), bool), n + 1)


def test_estimates_are_unbiased_and_their_error_is_that_over_questions():
    rng = np.random.default_rng(3)
    chance = rng.random(500)
    found = [significance.pass_estimates(rng.random((500, 12)) < chance[:, None]) for _ in range(100)]
    assert list(found[0]) == ["pass@1", "pass@2", "pass@4", "pass@8", "pass@10"]
    for k in (1, 4, 10):
        values = [f[f"pass@{k}"]["value"] for f in found]
        assert np.mean(values) == pytest.approx((1 - (1 - chance) ** k).mean(), abs=0.002)
    # one draw of the questions here: the error is that of other questions too, and so larger than the values' spread
    per_question = significance.pass_at_k(np.array([[1, 0], [0, 0], [1, 1]], bool), 1)
    one = significance.pass_estimates(np.array([[1, 0], [0, 0], [1, 1]], bool))["pass@1"]
    assert one == {"value": 0.5, "stderr": pytest.approx(per_question.std(ddof=1) / math.sqrt(3))}
    many = significance.pass_estimates(np.ones((2, 100), bool))
    assert list(many) == [f"pass@{k}" for k in (1, 2, 4, 8, 10, 16, 32, 64, 100)]

"""Standard errors, and tests of whether two scores differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy over n independent questions."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def mean_of(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error) of independent figures with these standard errors."""
    n = len(values)
    return sum(values) / n, math.sqrt(sum(e**2 for e in errors)) / n


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p that both are right equally often, of the questions that only one has right (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def by_error(difference: float, stderr: float, degrees: int | None = None) -> float:
    """Two-sided p of a difference that is 0 but for an error of this size; Student's t where degrees are given."""
    from scipy.stats import norm, t

    if not stderr:
        return 1.0 if not difference else 0.0
    z = abs(difference) / stderr
    return float(2 * (norm.sf(z) if degrees is None else t.sf(z, degrees)))


def two_proportions(a: float, n_a: int, b: float, n_b: int) -> tuple[float, float]:
    """(standard error of b - a, p of the pooled z-test) for two shares of independent questions."""
    pooled = (a * n_a + b * n_b) / (n_a + n_b)
    apart = math.hypot(standard_error(a, n_a), standard_error(b, n_b))
    return apart, by_error(b - a, math.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b)))


def paired(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """(standard error, p of the paired t-test) of b - a, means of n independent pairs (n,), or sums over sum(weights).

    With weights it is the error of a ratio, by the residuals from it.
    """
    n, apart = len(a), b - a
    weights = np.ones(n) if weights is None else weights
    difference = apart.sum() / weights.sum()
    if n < 2:
        return 0.0, 1.0
    stderr = ratio_error(apart, weights)
    return stderr, by_error(float(difference), stderr, n - 1)


def ratio_error(part: np.ndarray, whole: np.ndarray) -> float:
    """Standard error of sum(part) / sum(whole) over independent pairs (n,); 0 where there is but one."""
    n = len(part)
    residuals = part - whole * (part.sum() / whole.sum())
    return float(np.sqrt((residuals**2).sum() * n / max(1, n - 1)) / whole.sum())


def holm(p: Sequence[float]) -> list[float]:
    """p-values such that, whatever is true, the chance of any of them to be small by luck is as it says (Holm 1979)."""
    out, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        out[i] = largest
    return out

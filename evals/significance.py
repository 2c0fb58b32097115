"""Standard errors, tests of whether two scores differ by more than chance, and pass@k."""

import math
from collections.abc import Sequence

import numpy as np

PUBLISHED_K = (10, 100)  # what papers report, beside the powers of two


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy over n independent questions."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def mean_of(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error) of independent figures with these standard errors."""
    return sum(values) / len(values), math.sqrt(sum(e**2 for e in errors)) / len(values)


def ratio_error(part: np.ndarray, whole: np.ndarray) -> float:
    """Standard error of sum(part) / sum(whole) over independent pairs (n,); 0 where there is but one."""
    n = len(part)
    residuals = part - whole * (part.sum() / whole.sum())
    return float(np.sqrt((residuals**2).sum() * n / max(1, n - 1)) / whole.sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p that both are right equally often, of the questions that only one has right (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def by_error(difference: float, stderr: float, degrees: float = math.inf) -> float:
    """Two-sided p of a difference that is 0 but for an error of this size: Student's t, normal without `degrees`."""
    from scipy.stats import t

    if not stderr:
        return 1.0 if not difference else 0.0
    return float(2 * t.sf(abs(difference) / stderr, degrees))


def two_proportions(a: float, n_a: int, b: float, n_b: int) -> tuple[float, float]:
    """(standard error of b - a, p of the pooled z-test) for two shares of independent questions."""
    pooled = (a * n_a + b * n_b) / (n_a + n_b)
    apart = math.hypot(standard_error(a, n_a), standard_error(b, n_b))
    return apart, by_error(b - a, math.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b)))


def paired(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """(standard error, p of the paired t-test) of b - a: means of independent pairs (n,), or sums over sum(weights)."""
    weights = np.ones(len(a)) if weights is None else weights
    if len(a) < 2:
        return 0.0, 1.0
    stderr = ratio_error(b - a, weights)
    return stderr, by_error(float((b - a).sum() / weights.sum()), stderr, len(a) - 1)


def holm(p: Sequence[float]) -> list[float]:
    """p-values such that, whatever is true, the chance of any of them to be small by luck is as it says (Holm 1979)."""
    out, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        out[i] = largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
    return out


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """(Q,) float64, the chance that one of k answers is right: 1 - C(n - c, k) / C(n, k) for each question of right
    (Q, n) bool, c of whose n answers are right. Unbiased, while 1 - (1 - c / n)^k is too small. arXiv 2107.03374.
    """
    n, c, i = right.shape[1], right.sum(axis=1), np.arange(k)[:, None]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be told from {n} answers to a question")
    return 1.0 - np.prod(np.maximum(n - c - i, 0) / (n - i), axis=0)


def pass_estimates(right: np.ndarray) -> dict[str, dict[str, float]]:
    """{"pass@1": {"value", "stderr" over questions}, ...} of right (Q, n) bool, k = 1, 2, 4, ..., 10, 100 up to n."""
    n = right.shape[1]
    ks = sorted({2**i for i in range(n.bit_length())} | {k for k in PUBLISHED_K if k <= n})
    chances, ones = {k: pass_at_k(right, k) for k in ks}, np.ones(len(right))
    return {f"pass@{k}": {"value": float(c.mean()), "stderr": ratio_error(c, ones)} for k, c in chances.items()}

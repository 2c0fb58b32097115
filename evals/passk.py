"""pass@k: the chance that at least one of k answers to a question is right. Chen et al., arXiv 2107.03374."""

from __future__ import annotations

import numpy as np

from evals.significance import ratio_error

PUBLISHED = (10, 100)  # beside the powers of two, what papers report


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """(Q,) float64: 1 - C(n - c, k) / C(n, k) for each question of right (Q, n) bool, c of whose n answers are right.

    Its mean over drawings of the n answers is the chance itself, where 1 - (1 - c / n)^k would be too small.
    """
    n, c = right.shape[1], right.sum(axis=1)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be told from {n} answers to a question")
    i = np.arange(k)[:, None]
    return 1.0 - np.prod(np.maximum(n - c - i, 0) / (n - i), axis=0)  # C(n - c, k) / C(n, k), factor by factor


def sizes(n: int) -> list[int]:
    """The k that n answers to a question are reported for: powers of two, 10 and 100."""
    return sorted({2**i for i in range(n.bit_length())} | {k for k in PUBLISHED if k <= n})


def estimates(right: np.ndarray) -> dict[str, dict[str, float]]:
    """{"pass@1": {"value", "stderr"}, ...} of right (Q, n) bool; the standard error is that over questions."""
    chances = {k: pass_at_k(right, k) for k in sizes(right.shape[1])}
    ones = np.ones(len(right))
    return {f"pass@{k}": {"value": float(c.mean()), "stderr": ratio_error(c, ones)} for k, c in chances.items()}

"""How many times the tokens, or the seconds, a base needs to be as good as a variant: the compute multiplier.

The base is trained at several lengths, each with a schedule of its own. Its bits per byte are a curve over the
logarithm of the tokens, straight between two lengths and beyond them; where this curve has a variant's bits per byte
stands the length that the base would have needed.

Intervals are a bootstrap's over seeds, drawn for base and variant together, as runs of one seed share their data's
order. Few seeds make a bootstrap's intervals too narrow: its deviations are widened by sqrt(n / (n - 1)) and by
Student's t over the normal's quantile (Hesterberg 2015, section 3.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from nanochat_jax.planning.fit import LEVEL, UNUSABLE, Interval
from nanochat_jax.planning.runs import Run

DRAWS = 4000


@dataclass(frozen=True)
class Multipliers:
    tokens: Interval
    seconds: Interval
    beyond: bool  # whether the variant's mean lies outside of what the base's lengths reach


def multipliers(base: Sequence[Mapping[int, Run]], variant: Mapping[int, Run]) -> Multipliers:
    """base: of each of two or more lengths, the runs by the place of their seed; variant: its runs alike. Of places
    that all of them have, there must be two."""
    *lengths, mine = (*base, variant)
    places = [p for p in mine if all(p in of for of in lengths)]
    # (runs, seeds): of every length of the base, and last the variant
    bpb, tokens, seconds = (
        np.array([[getattr(of[p], name) for p in places] for of in (*lengths, mine)], float)
        for name in ("bpb", "tokens", "seconds")
    )
    order = np.argsort(tokens[:-1, 0])
    x, rates = np.log(tokens[:, 0]), seconds / tokens

    def ratio(chosen) -> tuple[float, float]:
        """Logarithms of both multipliers for the seeds `chosen`."""
        means = bpb[:, chosen].mean(axis=1)
        gained = _inverse(x[:-1][order], means[:-1][order], means[-1]) - x[-1]
        return gained, gained + np.log(np.median(rates[:-1, chosen]) / np.median(rates[-1, chosen]))

    n = len(places)
    centre = np.array(ratio(np.arange(n)))
    rng, at = np.random.default_rng(0), (1 + LEVEL) / 2
    draws = np.array([ratio(rng.integers(0, n, n)) for _ in range(DRAWS)])
    wider = np.sqrt(n / (n - 1)) * stdtrit(n - 1, at) / ndtri(at)
    told = draws[np.isfinite(draws).all(axis=1)]  # in the others the base does not improve from length to length
    if not np.isfinite(centre).all() or len(told) < (1 - UNUSABLE) * DRAWS:
        of_tokens = of_seconds = Interval(float("nan"), 0.0, float("inf"))
    else:
        of_tokens, of_seconds = (Interval.of(np.exp(c), np.exp(c + wider * (d - c))) for c, d in zip(centre, told.T))
    reached, mean = bpb[:-1].mean(axis=1), bpb[-1].mean()
    return Multipliers(of_tokens, of_seconds, not reached.min() <= mean <= reached.max())


def _inverse(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Where the falling curve through (x, y), straight between points and beyond them, is `at`; NaN where it rises."""
    if (np.diff(y) >= 0).any():
        return np.nan
    i = int(np.clip(np.searchsorted(-y, -at) - 1, 0, len(x) - 2))
    return x[i] + (at - y[i]) * (x[i + 1] - x[i]) / (y[i + 1] - y[i])

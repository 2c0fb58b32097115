"""How the loss falls with parameters and tokens, and how a budget of FLOPs is best divided between the two.

Approaches 2 and 3 of Hoffmann et al. (arXiv 2203.15556): a parabola through the losses of each budget, and the law
L(N, D) = E + A / N^alpha + B / D^beta through all of them. A token costs k N^b and not 6 N, fitted to the models at
hand: in small ones attention is a large part of it.

Intervals are those of a parametric bootstrap, so they cover chance (seeds, the order of rows) and not what is wrong
with the law. In 60 simulated sweeps of 15 models with 0.3 % of noise, intervals of 90 % held the best tokens per
parameter in 90 %, beta in 92 %, the exponent in 85 %, but E in 80 % and alpha in 73 %: these two trade off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri, stdtrit

LEVEL = 0.9  # of the intervals
DRAWS = 400
WIDEST = 10.0  # an interval whose ends are further apart than this factor says nothing
UNUSABLE = (1 - LEVEL) / 2  # a larger share of refits without an answer leaves an end of the interval open
HUBER = 1e-3  # of log residuals: beyond it they count by their size and not by its square
POINTS = 8  # of the law, which has five constants
SIZES = 3  # different parameters, different tokens, sizes of a budget


class NoFit(Exception):
    """The points do not say; the message is a clause that says why."""


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Sequence[float] | np.ndarray) -> Self:
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class Cost:
    """FLOPs of a token as k N^b."""

    k: float
    b: float

    @classmethod
    def of(cls, params: Sequence[float], flops_per_token: Sequence[float]) -> Self:
        b, log_k = np.polyfit(np.log(params), np.log(flops_per_token), 1)
        return cls(float(np.exp(log_k)), float(b))

    def tokens(self, flops, params):
        return flops / (self.k * params**self.b)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in the unit of the losses."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, params, tokens):
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def best_params(self, flops, cost: Cost):
        """Where A / N^alpha + B / D^beta is least with k N^b D = flops; equation 4 of the paper has k = 6, b = 1."""
        a, b = self.alpha, cost.b * self.beta
        return (a * self.A / (b * self.B) * (flops / cost.k) ** self.beta) ** (1 / (a + b))

    def exponent(self, cost: Cost) -> float:
        """The best N grows as the budget to this power."""
        return self.beta / (self.alpha + cost.b * self.beta)


@dataclass(frozen=True)
class Optimum:
    """The best division of a budget. inside: whether its parameters lie between the smallest and the largest tried."""

    flops: float
    params: Interval
    tokens: Interval
    ratio: Interval  # tokens per parameter
    inside: bool


@dataclass(frozen=True)
class LawFit:
    law: Law
    constants: dict[str, Interval]  # E, A, alpha, B, beta, and `exponent`
    optima: list[Optimum]
    residual: float  # root mean square, as a share of the loss, for the points less the constants


@dataclass(frozen=True)
class Parabola:
    """loss = curve[0] x^2 + curve[1] x + curve[2] with x = ln N, through the losses of one budget."""

    flops: float
    curve: tuple[float, ...]
    optimum: Optimum | None
    why_not: str | None = None  # where there is no optimum


@dataclass(frozen=True)
class Parabolas:
    each: list[Parabola]
    exponent: Interval | None  # of the best N over budgets, where two and more have one


def fit_law(
    params: Sequence[float], tokens: Sequence[float], losses: Sequence[float], cost: Cost, budgets: Sequence[float]
) -> LawFit:
    """The law through all points, and what it says of each of `budgets` (FLOPs). NoFit."""
    n, d, log_losses = np.asarray(params, float), np.asarray(tokens, float), np.log(losses)
    if len(n) < POINTS:
        raise NoFit(f"the law has five constants and needs {POINTS} models, here are {len(n)}")
    for name, values in (("parameters", n), ("tokens", d)):
        if len(np.unique(values)) < SIZES:
            raise NoFit(f"the law needs {SIZES} different numbers of {name}, here are {len(np.unique(values))}")
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    best = min((_descend(start, x, y, log_losses) for start in _starts(float(np.mean(losses)))), key=lambda r: r.fun)
    if _degenerate(best.x):
        raise NoFit("the losses do not fall with parameters and with tokens as the law wants it")
    fitted = np.logaddexp.reduce(_terms(best.x, x, y))
    residual, noise = _noise(log_losses - fitted, len(n) - len(best.x))
    rng = np.random.default_rng(0)
    again = [_descend(best.x, x, y, fitted + noise * rng.standard_normal(len(fitted))).x for _ in range(DRAWS)]
    draws = [_law(c, n, d) for c in again if not _degenerate(c)]
    if len(draws) < (1 - UNUSABLE) * DRAWS:
        raise NoFit(f"residuals of {residual:.2%} leave open whether the losses fall by parameters or by tokens")
    law = _law(best.x, n, d)
    optima = []
    for flops in budgets:
        best_n = np.array([m.best_params(flops, cost) for m in (law, *draws)])
        optima.append(_optimum(flops, best_n[0], best_n[1:], cost, n))
    names = [f.name for f in fields(Law)]
    constants = {name: Interval.of(getattr(law, name), [getattr(m, name) for m in draws]) for name in names}
    constants["exponent"] = Interval.of(law.exponent(cost), [m.exponent(cost) for m in draws])
    factor = optima[-1].ratio.high / optima[-1].ratio.low
    if factor > WIDEST:
        raise NoFit(f"residuals of {residual:.2%} leave the best tokens per parameter open by a factor of {factor:.0f}")
    return LawFit(law, constants, optima, residual)


def _noise(residuals: np.ndarray, free: int) -> tuple[float, float]:
    """Their standard deviation with `free` degrees of freedom, and that of normal noise whose intervals are as wide as
    Student's t has them, as the deviation is itself estimated."""
    deviation = float(np.sqrt(np.square(residuals).sum() / free))
    at = (1 + LEVEL) / 2
    return deviation, deviation * float(stdtrit(free, at) / ndtri(at))


# The constants that are searched: ln A, ln B (both at the mean ln N and ln D), ln E, alpha, beta.
_BOUNDS = [(-12.0, 6.0), (-12.0, 6.0), (-12.0, 6.0), (0.01, 3.0), (0.01, 3.0)]


def _starts(mean: float) -> list[np.ndarray]:
    """E as a share of the mean loss, the rest divided between A and B, and exponents around the paper's."""
    return [
        np.array([np.log(mean * (1 - e) * s), np.log(mean * (1 - e) * (1 - s)), np.log(mean * e), alpha, beta])
        for e, s, alpha, beta in product((0.2, 0.5, 0.8), (0.3, 0.7), (0.1, 0.35, 1.0), (0.1, 0.35, 1.0))
    ]


def _terms(c: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(3, points) logarithms of the law's terms."""
    return np.stack([c[0] - c[3] * x, c[1] - c[4] * y, np.full_like(x, c[2])])


def _descend(start: np.ndarray, x: np.ndarray, y: np.ndarray, log_losses: np.ndarray):
    """L-BFGS on the Huber loss of log residuals, in units of HUBER, from one start."""

    def objective(c):
        terms = _terms(c, x, y)
        predicted = np.logaddexp.reduce(terms)
        r = (predicted - log_losses) / HUBER
        near = np.clip(r, -1, 1)
        slope = near / HUBER * np.exp(terms - predicted)
        value = (near * (r - 0.5 * near)).sum()
        return value, np.array([*slope.sum(axis=1), -(slope[0] * x).sum(), -(slope[1] * y).sum()])

    options = {"maxiter": 3000, "ftol": 1e-12}
    return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=_BOUNDS, options=options)


def _degenerate(c: np.ndarray) -> bool:
    """Whether a term of N or D is gone or has no shape. E may be: it is then too small to be seen."""
    return bool(np.isclose(c[:, None], _BOUNDS, atol=1e-6)[[0, 1, 3, 4]].any())


def _law(c: np.ndarray, n: np.ndarray, d: np.ndarray) -> Law:
    alpha, beta = float(c[3]), float(c[4])
    A, B = np.exp(c[0] + alpha * np.log(n).mean()), np.exp(c[1] + beta * np.log(d).mean())
    return Law(float(np.exp(c[2])), float(A), alpha, float(B), beta)


def _optimum(flops: float, best: float, draws: np.ndarray, cost: Cost, tried: np.ndarray) -> Optimum:
    tokens, again = cost.tokens(flops, best), cost.tokens(flops, draws)
    found = Interval.of(best, draws), Interval.of(tokens, again), Interval.of(tokens / best, again / draws)
    return Optimum(float(flops), *found, bool(tried.min() <= best <= tried.max()))


def fit_parabolas(params: Sequence[float], losses: Sequence[float], budgets: Sequence[float], cost: Cost) -> Parabolas:
    """A parabola for each budget; budgets (points,): the FLOPs of each point. The noise of the intervals is that of all
    budgets together, as each has few points. NoFit where none has the sizes, or the noise cannot be told."""
    n, loss, flops_of = (np.asarray(v, float) for v in (params, losses, budgets))
    usable = [c for c in np.unique(flops_of) if len(np.unique(n[flops_of == c])) >= SIZES]
    if not usable:
        raise NoFit(f"a parabola needs {SIZES} sizes at one budget")
    points = [(np.log(n[flops_of == c]), loss[flops_of == c]) for c in usable]
    curves = [np.polyfit(x, y, 2) for x, y in points]
    free = sum(len(x) - 3 for x, _ in points)
    if not free:
        raise NoFit("three sizes at each budget fit a parabola exactly, whatever the noise: take a fourth")
    residuals = np.concatenate([y - np.polyval(c, x) for (x, y), c in zip(points, curves)])
    (deviation, noise), rng = _noise(residuals, free), np.random.default_rng(0)
    each, lowest, drawn = [], [], []
    for flops, (x, _), curve in zip(usable, points, curves):
        made = np.polyval(curve, x) + noise * rng.standard_normal((DRAWS, len(x)))
        again = np.array([_lowest(c, x) for c in np.polyfit(x, made.T, 2).T])
        best, found = _lowest(curve, x), again[np.isfinite(again)]
        why_not, optimum = None, None
        if np.isnan(best):
            why_not = "no minimum between the sizes tried"
        elif len(found) < (1 - UNUSABLE) * DRAWS:
            why_not = f"noise of {deviation:.3f} hides where the minimum is"
        else:
            optimum = _optimum(flops, np.exp(best), np.exp(found), cost, np.exp(x))
            lowest.append(best)
            drawn.append(np.where(np.isfinite(again), again, best))
        each.append(Parabola(float(flops), tuple(map(float, curve)), optimum, why_not))
    exponent = None
    if len(lowest) > 1:
        located = np.log([p.flops for p in each if p.optimum])
        slopes = np.polyfit(located, np.column_stack([lowest, *np.transpose(drawn)]), 1)[0]
        exponent = Interval.of(slopes[0], slopes[1:])
    return Parabolas(each, exponent)


def _lowest(curve: np.ndarray, x: np.ndarray) -> float:
    """ln N at the parabola's minimum; NaN where there is none between the sizes tried."""
    if curve[0] <= 0:
        return np.nan
    at = -curve[1] / (2 * curve[0])
    return at if x.min() <= at <= x.max() else np.nan

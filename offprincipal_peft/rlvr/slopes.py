"""The slope of a reward curve, with an interval: of this run alone, or of runs like it.

Both were chosen by simulated coverage (``tests/rlvr/test_statistics.py``, ``test_run_slope.py``). The usual Newey–West
interval covered 67 % instead of 95 % on 14 points with autocorrelation 0.6; :func:`slope` averages over the
autocorrelation instead of estimating it, and covers 94 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .statistics import LEVEL, Interval, scipy_module, tails

# Autocorrelations that a slope's interval averages over. Wider than 0.98 a trend and a random walk look the same.
_RHO = np.linspace(-0.95, 0.98, 40)


def slope(values: Sequence[float], x: Sequence[float] | None = None, level: float = LEVEL) -> Interval:
    """Change of ``values`` (n,) per unit of ``x`` (n,; 0, 1, … by default), honest about autocorrelated points.

    Straight line with AR(1) noise: at each autocorrelation ρ of a grid the generalised least squares slope has a t
    distribution with n − 2 degrees of freedom; these are averaged with the restricted likelihood of ρ as weights
    (Harville 1974; a flat prior on ρ). Neighbouring points are taken to be one step apart, whatever ``x`` says.
    Simulated coverage of 95 % intervals: n = 14: 0.97, 0.94, 0.89 at ρ = 0, 0.6, 0.8; n = 60: 0.96, 0.95, 0.96.

    With fewer than 4 points there is no interval. Raises ``ValueError`` for fewer than 2 points, unequal lengths,
    a constant ``x`` or numbers that are not finite.
    """
    y, at = _checked_curve(values, x)
    n = len(y)
    centred = at - at.mean()
    plain = float(centred @ (y - y.mean()) / (centred @ centred))
    rest = y - y.mean() - plain * centred
    if n < 4:
        return Interval(plain, None, None, level, n)
    if rest @ rest <= (1e-12 * np.abs(y).max()) ** 2 * n:  # the line goes through every point
        return Interval(plain, plain, plain, level, n)
    inverses, logdets = _precisions(n)
    design = np.stack([np.ones(n), centred], axis=1)
    information = np.einsum("ia,gij,jb->gab", design, inverses, design)
    solved = np.linalg.solve(information, np.einsum("ia,gij,j->ga", design, inverses, y)[..., None])[..., 0]
    residuals = y - solved @ design.T
    quadratic = np.einsum("gi,gij,gj->g", residuals, inverses, residuals)
    weight = -0.5 * (logdets + np.linalg.slogdet(information)[1]) - 0.5 * (n - 2) * np.log(quadratic)
    weight = np.exp(weight - weight.max())
    weight /= weight.sum()
    error = np.sqrt(quadratic / (n - 2) * np.linalg.inv(information)[:, 1, 1])
    low, high = (_mixture_quantile(weight, solved[:, 1], error, n - 2, q) for q in tails(level))
    return Interval(float(weight @ solved[:, 1]), low, high, level, n)


def run_slope(values: Sequence[float], x: Sequence[float] | None = None, level: float = LEVEL) -> Interval:
    """Least squares slope of *this run's* expected reward, of which ``values`` (n,) are noisy samples.

    Every step draws new prompts and samples, so given the policies of a run the noise is independent between steps;
    the policies' own path, however curved or autocorrelated, is what the slope describes. The noise's variance is
    half the mean square of successive differences (von Neumann 1941), which a smooth path hardly enters. Nothing is
    said of other seeds: for a trend beyond the run see :func:`slope`. Simulated coverage of 95 % intervals on
    straight, saturating and falling paths: 0.94 to 0.97 at n = 14 and 0.94 at n = 60.

    With fewer than 4 points there is no interval. Raises as :func:`slope`.
    """
    y, at = _checked_curve(values, x)
    n = len(y)
    centred = at - at.mean()
    spread = float(centred @ centred)
    plain = float(centred @ (y - y.mean())) / spread
    if n < 4:
        return Interval(plain, None, None, level, n)
    error = float(np.sqrt(np.mean(np.diff(y) ** 2) / 2 / spread))
    freedom = 2 * (n - 1) ** 2 / (3 * n - 4)  # of the mean square of differences of independent values
    half = error * float(scipy_module("stats").t.ppf(tails(level)[1], freedom))
    return Interval(plain, plain - half, plain + half, level, n)


def _checked_curve(values: Sequence[float], x: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    y = np.asarray(values, dtype=float)
    at = np.arange(len(y), dtype=float) if x is None else np.asarray(x, dtype=float)
    if y.ndim != 1 or at.shape != y.shape:
        raise ValueError(f"a slope needs values and x of one length, not shapes {y.shape} and {at.shape}")
    if len(y) < 2:
        raise ValueError(f"a slope needs at least 2 points, not {len(y)}")
    if not (np.isfinite(y).all() and np.isfinite(at).all()):
        raise ValueError("a slope needs finite numbers; leave out the points that have none")
    if np.ptp(at) == 0:
        raise ValueError("a slope needs different x, all are equal")
    return y, at


@lru_cache(maxsize=16)
def _precisions(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse AR(1) correlation matrices (grid, n, n) and the correlations' log determinants (grid,)."""
    inverses = np.zeros((len(_RHO), n, n))
    steps = np.arange(n)
    inverses[:, steps, steps] = (1 + _RHO**2)[:, None]
    inverses[:, [0, -1], [0, -1]] = 1.0
    inverses[:, steps[1:], steps[:-1]] = inverses[:, steps[:-1], steps[1:]] = -_RHO[:, None]
    return inverses / (1 - _RHO**2)[:, None, None], (n - 1) * np.log(1 - _RHO**2)


def _mixture_quantile(weight: np.ndarray, centre: np.ndarray, error: np.ndarray, df: int, q: float) -> float:
    """The q quantile of a mixture of t distributions, by bisection between its parts' quantiles."""
    t = scipy_module("stats").t
    parts = centre + error * t.ppf(q, df)
    low, high = float(parts.min()), float(parts.max())
    for _ in range(60):
        middle = 0.5 * (low + high)
        if float(weight @ t.cdf((middle - centre) / error, df)) < q:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)

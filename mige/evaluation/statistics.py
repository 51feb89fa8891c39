"""95 % intervals: of means (bootstrap, Student's t), of shares (Wilson), of means over seeds and cases.

Letters: K clusters, S seeds (runs), C cases.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES, SEED = 2000, 0
FEW = 50  # clusters below which a bootstrap is too narrow, and Student's t is taken
_TWO_SIDED = 0.975  # the quantile of a two-sided 95 % interval

Interval = tuple[float | None, float | None]
"""Low and high; None where there is no interval: one value says nothing of another."""

Clusters = Sequence[str] | None
"""Which values go together: samples of one subject, session or source image. None: each is on its own."""


def interval(
    values: Sequence[float], clusters: Clusters = None, *, level: float = 0.95, share: bool = False
) -> tuple[float, *Interval]:
    """Mean with its interval: by bootstrap, of fewer than 50 clusters by Student's t, of one none.

    Args:
        share: the values are differences of 0 and 1. Student's t, as `estimate` has it: with two cases added, one for
            and one against, so that no few equal ones seem certain, and the interval ends at -1 and 1.

    Raises ValueError without values or for one that is not finite.
    """
    if share:
        low, high = t_interval(values, clusters, level=level, squares=2)
        return _mean(values), *((None, None) if low is None else (max(-1.0, low), min(1.0, high)))
    if len(values if clusters is None else set(clusters)) >= FEW:
        return bootstrap(values, clusters, level=level)
    return _mean(values), *t_interval(values, clusters, level=level)


def bootstrap(values: Sequence[float], clusters: Clusters = None, *, level: float = 0.95) -> tuple[float, *Interval]:
    """Mean, and the percentiles of the means of 2,000 resamples of the clusters (Efron 1979), the same at every call.

    A cluster is drawn with all its values, so that the interval holds for further clusters, not for further samples of
    these. Raises ValueError without values or for one that is not finite.
    """
    mean = _mean(values)
    sums_K, counts_K = _by_cluster(values, clusters)
    if len(sums_K) == 1:
        return mean, None, None
    found = stats.bootstrap(
        (sums_K, counts_K),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,  # all at once would hold some 60 MB of indices for 3,589 values
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return mean, float(found.low), float(found.high)


def t_interval(
    values: Sequence[float], clusters: Clusters = None, *, level: float = 0.95, squares: float = 0
) -> Interval:
    """Student's t interval of a mean; none of one cluster. Raises ValueError as `bootstrap` does.

    Of clusters the mean is a ratio of sums, whose variance is that of each cluster's sum of deviations (Cochran,
    Sampling Techniques, 1977, eq. 6.13); where each value is on its own, it is the usual standard error. `squares` are
    added to the sum of squared deviations.
    """
    mean = _mean(values)
    sums_K, counts_K = _by_cluster(values, clusters)
    num = len(sums_K)
    if num == 1:
        return None, None
    deviations = np.square(sums_K - mean * counts_K).sum() + squares
    error = math.sqrt(num / (num - 1) * deviations) / counts_K.sum()
    half = float(stats.t.ppf((1 + level) / 2, num - 1) * error)
    return mean - half, mean + half


def _by_cluster(values: Sequence[float], clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, float64 [K]."""
    values = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return values, np.ones_like(values)
    place_of = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return np.bincount(place_of, weights=values), np.bincount(place_of).astype(np.float64)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share; half successes count as such. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"an interval needs at least one trial, got {n}")
    z, p = round(float(stats.norm.ppf(_TWO_SIDED)), 6), successes / n  # 1.959964, as reports have always had it
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t; `freedom` at least 1, not necessarily whole."""
    return float(stats.t.ppf(_TWO_SIDED, freedom))


def _mean(values: Sequence[float]) -> float:
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"a mean needs at least one value and finite ones, got {sample.size} values")
    return float(sample.mean())


# ---- seeds and cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        over_seeds: False if nothing was known about the spread between seeds: the interval is over cases alone.
    """

    mean: float
    low: float
    high: float
    cases: int
    over_seeds: bool

    def verdict(self, higher_is_better: bool = True) -> str:
        """What the interval says of the claim that the mean is on the better side of 0."""
        if self.low <= 0 <= self.high:
            return "not resolved"
        return "supported" if (self.mean > 0) == higher_is_better else "contradicted"


def estimate(
    runs_SC: np.ndarray, against_SC: np.ndarray | None, *, alike: Sequence[np.ndarray], share: bool
) -> Estimate:
    """Mean of runs, less that of other runs on the same cases, with its t interval.

    Its variance is a sum: s²/S of each side, s² the variance between the means of runs that differ in their seed
    alone, pooled over all of `alike`; and v/C, v the variance over cases of the difference (of each side's mean over
    seeds). Degrees of freedom by Welch and Satterthwaite (Biometrics Bulletin 2, 1946). What one run makes of one case
    counts in both, so the interval errs on the wide side. Without two seeds of any variant the first part is left out.

    Args:
        runs_SC: float [S, C], NaN where a case has no such score. against_SC: the same of what is subtracted, or
            float [C] for something fixed, such as a baseline; None for nothing.
        alike: [S, C] of every variant whose seeds tell how far runs lie apart.
        share: the scores are 0 or 1 (or halves). Two cases are then added to v, one for and one against, or a share of
            none of 20 would seem certain; and the interval ends at -1 and 1.

    Raises ValueError for fewer than two cases that all runs have.
    """
    fixed = against_SC is None or against_SC.ndim == 1
    other_SC = np.zeros(runs_SC.shape[1]) if against_SC is None else against_SC
    other_SC = np.atleast_2d(other_SC)
    there = ~np.isnan(runs_SC).any(axis=0) & ~np.isnan(other_SC).any(axis=0)
    cases = int(there.sum())
    if cases < 2:
        raise ValueError(f"an interval needs at least two cases, got {cases}: raise the number of cases of a kind")
    by_case = runs_SC[:, there].mean(axis=0) - other_SC[:, there].mean(axis=0)  # [C]
    mean = float(by_case.mean())
    squares = np.square(by_case - mean).sum() + (2 if share else 0)
    parts = [(squares / (cases - 1) / cases, cases - 1)]
    between, freedom = spread(alike)
    if freedom:
        parts.append((between * (1 / len(runs_SC) + (0 if fixed else 1 / len(other_SC))), freedom))
    variance = sum(part for part, _ in parts)
    half = float(np.sqrt(variance)) * t_quantile(variance**2 / sum(p**2 / n for p, n in parts)) if variance else 0.0
    most = 1.0 if share else np.inf
    return Estimate(mean, max(-most, mean - half), min(most, mean + half), cases, freedom > 0)


def spread(alike: Sequence[np.ndarray]) -> tuple[float, int]:
    """Variance between the means of runs of one variant, pooled over variants [S, C], and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for runs_SC in alike:
        means = runs_SC[:, ~np.isnan(runs_SC).any(axis=0)].mean(axis=1)
        squares += float(np.square(means - means.mean()).sum())
        freedom += len(means) - 1
    return (squares / freedom if freedom else 0.0), freedom

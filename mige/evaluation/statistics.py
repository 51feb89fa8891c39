"""Means over samples with 95 % bootstrap intervals."""

from collections.abc import Sequence

import numpy as np

RESAMPLES, SEED = 2000, 0


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the 2.5 and 97.5 percentiles of the means of 2,000 resamples (Efron 1979), the same at every call.

    Raises ValueError without values or for one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"a mean needs at least one value and finite ones, got {sample.size} values")
    n = sample.size
    counts = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.percentile(counts @ sample / n, [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)

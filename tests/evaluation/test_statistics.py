"""Intervals: against closed forms, and against the numbers that our own formulas gave before scipy."""

import math

import numpy as np
import pytest

from mige.evaluation import statistics


def test_the_interval_of_a_share_is_wilsons():
    """It holds the shares p whose score |p - s / n| / sqrt(p (1 - p) / n) is at most 1.96."""
    assert statistics.wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert statistics.wilson(5, 10) == pytest.approx((0.2365931, 0.7634069), abs=1e-6)
    assert statistics.wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    for successes, n in ((1, 1), (3, 7), (12.5, 52), (99, 104)):
        for p in statistics.wilson(successes, n):
            if 0 < p < 1:
                assert abs(p - successes / n) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-9)


@pytest.mark.parametrize("n", [0, -1])
def test_an_interval_of_nothing_is_refused(n):
    with pytest.raises(ValueError, match=f"at least one trial, got {n}"):
        statistics.wilson(0, n)


@pytest.mark.parametrize(
    ("freedom", "before"),
    [(1.5, 6.016660222), (2, 4.302652726), (3.3, 3.024874463), (55.5, 2.003639055), (1000, 1.962339182)],
)
def test_quantiles_are_those_of_our_own_integral(freedom, before):
    assert statistics.t_quantile(freedom) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(12.5, 52, 0.1447522230, 0.3717360541), (99, 104, 0.8923579714, 0.9792919578), (0, 10, 0, 0.2775328031)],
)
def test_shares_have_the_intervals_of_our_own_quantile(successes, n, low, high):
    assert statistics.wilson(successes, n) == pytest.approx((low, high), abs=1e-8)


def test_a_mean_has_students_interval():
    half = 3.182446 * math.sqrt(5 / 3) / 2  # of 3 degrees of freedom
    assert statistics.t_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)
    two = 12.706205 * 0.5  # of one: 6.5 times as wide as 1.96 standard errors
    assert statistics.t_interval([1.0, 2.0]) == pytest.approx((1.5 - two, 1.5 + two), rel=1e-6)


def test_one_value_has_no_interval():
    assert statistics.interval([0.2871]) == (0.2871, None, None)
    assert statistics.t_interval([0.2871]) == (None, None)


def test_few_values_have_students_interval_and_many_the_bootstraps():
    values = np.random.default_rng(2).normal(3, 2, 50).tolist()
    assert statistics.interval(values) == statistics.bootstrap(values)
    assert statistics.interval(values[:49])[1:] == statistics.t_interval(values[:49])


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_of_few_values_hold_the_mean_as_often_as_they_say(n):
    """Of normal values Student's interval is exact: 95 of 100 hold the mean; the bootstrap's would hold fewer."""
    rng, held = np.random.default_rng(n), 0
    for values in rng.normal(1, 1, (2000, n)):
        _, low, high = statistics.interval(values.tolist())
        held += low <= 1 <= high
    assert 0.935 * 2000 <= held <= 0.965 * 2000

"""Confidence intervals: they hold the truth as often as they say, and do not depend on who draws."""

import numpy as np
import pytest

from moeca_dist.evaluation.distribution import Gaussian, frechet_distance
from moeca_dist.evaluation.evaluate import _mean, _rel_l2
from moeca_dist.evaluation.intervals import Interval, draws, percentile_interval, standard_error_interval


def test_the_interval_of_a_mean_holds_it_19_times_out_of_20() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for repeat in range(300):
        interval = percentile_interval([rng.exponential(2.0, 200)], _mean, resamples=200, seed=repeat)
        assert interval is not None
        held += interval.low <= 2.0 <= interval.high
    assert 0.91 <= held / 300 <= 0.985


def test_values_of_one_image_are_drawn_together() -> None:
    """Where error is a fixed share of the energy of every image, no resample can give another ratio."""
    energy_N = np.random.default_rng(1).uniform(1, 100, 50)
    interval = percentile_interval([energy_N * 0.04, energy_N], _rel_l2, resamples=100, seed=0)
    assert interval is not None and (interval.low, interval.high) == pytest.approx((0.2, 0.2))


def test_the_interval_of_a_distance_is_as_wide_as_it_scatters() -> None:
    """Its standard error is that of distances between fresh samples, within a quarter."""
    rng = np.random.default_rng(2)

    def sample() -> np.ndarray:
        return rng.standard_normal((400, 4)) * [1, 2, 1, 1] + [0.5, 0, 0, 0]

    fixed = Gaussian.from_covariance(np.zeros(4), np.eye(4))
    scatter = np.std([frechet_distance(Gaussian.fit(sample()), fixed) for _ in range(300)])
    features = sample()
    found = [frechet_distance(Gaussian.fit(features, draws(400, index, 0)), fixed) for index in range(300)]
    value = frechet_distance(Gaussian.fit(features), fixed)
    interval = standard_error_interval(value, found, floor=0.0)
    assert interval is not None and interval.low < value < interval.high
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(scatter, rel=0.25)


def test_draws_are_those_of_the_resample_alone() -> None:
    assert draws(1000, 3, 7).sum() == 1000
    assert np.array_equal(draws(1000, 3, 7), draws(1000, 3, 7))
    for other in (draws(1000, 4, 7), draws(1000, 3, 8), draws(1000, 3, 7, stream=1)):
        assert not np.array_equal(draws(1000, 3, 7), other)


def test_without_resamples_or_with_one_image_there_is_no_interval() -> None:
    assert percentile_interval([np.ones(5)], _mean, resamples=0, seed=0) is None
    assert percentile_interval([np.ones(1)], _mean, resamples=50, seed=0) is None
    assert standard_error_interval(1.0, [], floor=0.0) is None
    assert standard_error_interval(0.5, [0.0, 2.0, 4.0], floor=0.0) == Interval(0.0, pytest.approx(0.5 + 2 * 1.959964))

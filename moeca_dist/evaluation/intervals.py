"""Confidence intervals of figures: bootstrap over images (Efron & Tibshirani 1993, chapters 6 and 13).

Shape suffixes: N images, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, norm

CONFIDENCE = 0.95
_BATCH_VALUES = 2**22


@dataclass(frozen=True)
class Interval:
    """The bounds of the 95% confidence interval."""

    low: float
    high: float


# Of arrays whose axis ``axis`` is that of the images.
Statistic = Callable[..., NDArray[np.float64]]


def percentile_interval(
    values: Sequence[NDArray[np.float64]], statistic: Statistic, *, resamples: int, seed: int
) -> Interval | None:
    """Return the interval of a statistic, or None for fewer than two images.

    The images are drawn, so all values of one image stay together.

    Args:
        values: one or several values per image, each float64 [N].
    """
    num_images = len(values[0])
    if num_images < 2 or not resamples:
        return None
    # A figure may be infinite, which scipy would warn of.
    with np.errstate(invalid="ignore"):
        result = bootstrap(
            values,
            statistic,
            n_resamples=resamples,
            # Indices of a batch of resamples are held at once.
            batch=max(1, _BATCH_VALUES // num_images),
            vectorized=True,
            paired=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(float(result.low), float(result.high))


def standard_error_interval(value: float, found_R: Sequence[float], floor: float) -> Interval | None:
    """Return the figure plus and minus 1.96 standard errors of its resamples, or None without resamples.

    This is for Frechet distances and Inception Scores. Their bias depends on the number of different images, of which a
    resample has fewer. So percentiles of resamples would lie to one side of the figure.

    Args:
        floor: smallest lower bound.
    """
    if len(found_R) < 2:
        return None
    half = float(norm.ppf((1 + CONFIDENCE) / 2) * np.std(found_R, ddof=1))
    return Interval(max(floor, value - half), value + half)


def draws(num_images: int, resample: int, seed: int, stream: int = 0) -> NDArray[np.int64]:
    """Return how often each image is in a resample, int64 [N]. The result is the same in every process.

    Sets of the same ``stream`` and size are drawn alike, as pairs are.
    """
    rng = np.random.default_rng([seed, resample, stream])
    return np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)

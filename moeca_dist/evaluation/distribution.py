"""Distances between two sets of features, and scores of one set of class probabilities.

Everything reads features chunk by chunk; precision and recall compare all pairs, block by block.

Shape suffixes: N samples of the first set, M of the second, F features, K classes, B a block of samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_chunked

Array = NDArray[np.floating]
INCEPTION_SPLIT = 5000  # images per split, as in ADM's evaluator
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, section 3
_CHUNK = 1024
# Distances come from x^2 + y^2 - 2xy: this much of the largest norm is rounding, and equal points must stay inside.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Moments:
    """Mean [F] and unbiased covariance [F, F] of features, float64."""

    mean_F: NDArray[np.float64]
    covariance_FF: NDArray[np.float64]

    @classmethod
    def of(cls, features_NF: Array, times_N: NDArray[np.integer] | None = None) -> "Moments":
        """Of features [N, F] with N >= 2, each counted ``times_N`` times (once unless given)."""
        count = len(features_NF) if times_N is None else int(times_N.sum())
        if count < 2:
            raise ValueError(f"a covariance takes at least two samples, not {count}")
        # Taken from a point inside the data, so that the sums of squares do not cancel.
        origin_F = features_NF[0].astype(np.float64)
        sum_F, square_FF = np.zeros(len(origin_F)), np.zeros((len(origin_F),) * 2)
        for chunk, x_BF in _chunks(features_NF, origin_F):
            weighted_BF = x_BF if times_N is None else x_BF * times_N[chunk, None]
            sum_F += weighted_BF.sum(0)
            square_FF += weighted_BF.T @ x_BF
        mean_F = sum_F / count
        return cls(mean_F + origin_F, (square_FF - count * np.outer(mean_F, mean_F)) / (count - 1))


def _chunks(features_NF: Array, origin_F: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    for start in range(0, len(features_NF), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        yield chunk, features_NF[chunk].astype(np.float64) - origin_F


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of two Gaussians: FID and sFID (Heusel et al. 2017, section 2).

    The trace of (AB)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2), which unlike the eigenvalues of AB are
    exact to rounding where the covariances are singular, as with fewer samples than features.
    """
    apart_F = first.mean_F - second.mean_F
    cross_F = scipy.linalg.svdvals(_root(first.covariance_FF) @ _root(second.covariance_FF))
    traces = np.trace(first.covariance_FF) + np.trace(second.covariance_FF)
    return max(0.0, float(apart_F @ apart_F + traces - 2 * cross_F.sum()))


def _root(covariance_FF: NDArray[np.float64]) -> NDArray[np.float64]:
    values_F, vectors_FF = scipy.linalg.eigh(covariance_FF)
    return np.asarray((vectors_FF * np.sqrt(values_F.clip(min=0))) @ vectors_FF.T)


def inception_score(
    probabilities_NK: Array, times_N: NDArray[np.integer] | None = None, certainty_N: Array | None = None
) -> float:
    """Mean over splits of 5,000 images of exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4).

    ``times_N``: how often each image counts, once unless given. ``certainty_N``: ``negative_entropy`` of the same
    probabilities, for callers that ask more than once.
    """
    if certainty_N is None:
        certainty_N = negative_entropy(probabilities_NK)
    if times_N is None:
        times_N = np.ones(len(probabilities_NK), dtype=np.int64)
    scores = []
    for start in range(0, len(probabilities_NK), INCEPTION_SPLIT):
        split = slice(start, start + INCEPTION_SPLIT)
        # A resample may leave a short last split empty.
        count = max(1, int(times_N[split].sum()))
        marginal_K = times_N[split] @ probabilities_NK[split].astype(np.float64) / count
        certainty = float(times_N[split] @ certainty_N[split]) / count
        scores.append(np.exp(certainty - negative_entropy(marginal_K[None])[0]))
    return float(np.mean(scores))


def negative_entropy(probabilities_NK: Array) -> NDArray[np.float64]:
    """Sum over classes of p log p, float64 [N]; nought where p is nought."""
    certainty_N = np.empty(len(probabilities_NK))
    for start in range(0, len(probabilities_NK), _CHUNK):
        p_BK = probabilities_NK[start : start + _CHUNK].astype(np.float64)
        certainty_N[start : start + _CHUNK] = scipy.special.xlogy(p_BK, p_BK).sum(1)
    return certainty_N


def radii(features_NF: Array, *, workers: int = 1) -> NDArray[np.float64]:
    """Distance of each sample to its third nearest neighbour within the set; at least four samples."""
    if len(features_NF) <= NEIGHBOURS:
        raise ValueError(f"{len(features_NF)} samples have no neighbour number {NEIGHBOURS}")
    blocks = pairwise_distances_chunked(
        features_NF,
        metric="euclidean",
        n_jobs=workers,
        # The nearest one is the sample itself.
        reduce_func=lambda d_BN, start: np.partition(d_BN, NEIGHBOURS, axis=1)[:, NEIGHBOURS],
    )
    return np.concatenate(list(blocks)).astype(np.float64)


def inside(features_NF: Array, other_MF: Array, radii_M: NDArray[np.float64], *, workers: int = 1) -> NDArray[np.bool_]:
    """Which samples lie in the manifold of the other set: in the ball of any of its samples; bool [N].

    The mean is precision for generated samples in the manifold of real ones, and recall the other way round
    (Kynkaanniemi et al. 2019, equations 1 and 2).
    """
    largest = max(_largest_norm(features_NF), _largest_norm(other_MF))
    limit_M = radii_M + _ROUNDING * largest
    blocks = pairwise_distances_chunked(
        features_NF,
        other_MF,
        metric="euclidean",
        n_jobs=workers,
        reduce_func=lambda d_BM, start: (d_BM <= limit_M).any(1),
    )
    return np.concatenate(list(blocks))


def _largest_norm(features_NF: Array) -> float:
    chunks = (features_NF[start : start + _CHUNK] for start in range(0, len(features_NF), _CHUNK))
    return max(float(np.linalg.norm(chunk.astype(np.float64), axis=1).max()) for chunk in chunks)

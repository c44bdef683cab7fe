"""Distances between two sets of features, and scores of one set of class probabilities.

Features are read chunk by chunk. Precision and recall compare all pairs, block by block.

Shape suffixes: N samples of the first set, M of the second, F features, K classes, B a block of samples, R rows of a
factor.
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
class Gaussian:
    """A Gaussian fitted to features: its mean [F] and a factor [R, F] of its covariance, both float64.

    The product of the factor with itself is the covariance. With fewer samples than features the factor is the centred
    samples themselves, R = N. So nothing of size F x F is needed.
    """

    mean_F: NDArray[np.float64]
    factor_RF: NDArray[np.float64]

    @classmethod
    def fit(cls, features_NF: Array, times_N: NDArray[np.integer] | None = None) -> "Gaussian":
        """Fit a Gaussian to features [N, F], with the unbiased covariance.

        Raises ValueError for fewer than two samples.

        Args:
            times_N: how often each sample counts (once by default).
        """
        times_N = np.ones(len(features_NF), dtype=np.int64) if times_N is None else times_N
        count = int(times_N.sum())
        if count < 2:
            raise ValueError(f"a covariance takes at least two samples, not {count}")
        # Taken from a point inside the data, so that the sums of squares do not cancel.
        origin_F = features_NF[0].astype(np.float64)
        sum_F = sum(times_N[chunk] @ x_BF for chunk, x_BF in _chunks(features_NF, origin_F))
        mean_F = sum_F / count + origin_F
        if len(features_NF) <= features_NF.shape[1]:
            centred_NF = features_NF.astype(np.float64) - mean_F
            return cls(mean_F, centred_NF * np.sqrt(times_N / (count - 1))[:, None])
        square_FF = np.zeros((len(mean_F),) * 2)
        for chunk, x_BF in _chunks(features_NF, mean_F):
            square_FF += (x_BF * times_N[chunk, None]).T @ x_BF
        return cls.from_covariance(mean_F, square_FF / (count - 1))

    @classmethod
    def from_covariance(cls, mean_F: NDArray[np.float64], covariance_FF: NDArray[np.float64]) -> "Gaussian":
        values_F, vectors_FF = scipy.linalg.eigh(covariance_FF)
        return cls(mean_F, np.sqrt(values_F.clip(min=0))[:, None] * vectors_FF.T)


def _chunks(features_NF: Array, origin_F: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    for start in range(0, len(features_NF), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        yield chunk, features_NF[chunk].astype(np.float64) - origin_F


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Frechet distance of two Gaussians: FID and sFID (Heusel et al. 2017, section 2).

    The trace of (AB)^(1/2) for A = R'R and B = S'S is the sum of the singular values of RS'. Unlike the eigenvalues of
    AB they are exact to rounding, even if the covariances are singular.
    """
    apart_F = first.mean_F - second.mean_F
    cross_R = scipy.linalg.svdvals(first.factor_RF @ second.factor_RF.T)
    traces = np.square(first.factor_RF).sum() + np.square(second.factor_RF).sum()
    return max(0.0, float(apart_F @ apart_F + traces - 2 * cross_R.sum()))


def inception_score(
    probabilities_NK: Array, times_N: NDArray[np.integer] | None = None, certainty_N: Array | None = None
) -> float:
    """Return the mean over splits of 5,000 images of exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4).

    Args:
        times_N: how often each image counts (once by default).
        certainty_N: ``negative_entropy`` of the same probabilities, for callers that ask more than once.
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
    """Return the sum over classes of p log p, float64 [N]. A term is 0 if p is 0."""
    certainty_N = np.empty(len(probabilities_NK))
    for start in range(0, len(probabilities_NK), _CHUNK):
        p_BK = probabilities_NK[start : start + _CHUNK].astype(np.float64)
        certainty_N[start : start + _CHUNK] = scipy.special.xlogy(p_BK, p_BK).sum(1)
    return certainty_N


def radii(features_NF: Array, *, workers: int = 1) -> NDArray[np.float64]:
    """Return the distance of each sample to its third nearest neighbour within the set.

    Raises ValueError for fewer than four samples.
    """
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
    """Return which samples lie in the manifold of the other set, that is in the ball of any sample: bool [N].

    The mean is precision for generated samples in the manifold of real ones. It is recall the other way round
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

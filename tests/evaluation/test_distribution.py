"""Distribution metrics against torchmetrics and prdc, closed forms and slow loops, on real digits and adversarial sets.

Shape suffixes: N and M samples, F features, K classes.
"""

import math

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from moeca_dist.demo.data import augment, load_split, real_digits, to_uint8
from moeca_dist.demo.judge import DigitNetwork, features
from moeca_dist.evaluation.distribution import (
    INCEPTION_SPLIT,
    Gaussian,
    frechet_distance,
    inception_score,
    inside,
    radii,
)

RELATIVE = 1e-3


@pytest.fixture(scope="module")
def digits_NF() -> np.ndarray:
    return features(real_digits())


@pytest.fixture(scope="module")
def held_out_NF() -> np.ndarray:
    """Other digits than most of those above, drawn with other small movements."""
    _, held_out = load_split()
    return features(to_uint8(augment(held_out.ink_NHW, torch.Generator().manual_seed(5))))


def distance(first_NF: np.ndarray, second_NF: np.ndarray) -> float:
    return frechet_distance(Gaussian.fit(first_NF), Gaussian.fit(second_NF))


class Given(nn.Module):
    """In place of a feature network: what torchmetrics is handed are features already."""

    num_features = 64

    def forward(self, features_NF: Tensor) -> Tensor:
        return features_NF


def torchmetrics_distance(first_NF: np.ndarray, second_NF: np.ndarray) -> float:
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(torch.tensor(first_NF), real=False)
    metric.update(torch.tensor(second_NF), real=True)
    return float(metric.compute())


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_distance_of_digits(digits_NF: np.ndarray, held_out_NF: np.ndarray) -> None:
    assert distance(digits_NF, held_out_NF) == pytest.approx(
        torchmetrics_distance(digits_NF, held_out_NF), rel=RELATIVE
    )
    # Fewer samples than features: the covariances are singular.
    few = (digits_NF[:20], held_out_NF[:30])
    assert distance(*few) == pytest.approx(torchmetrics_distance(*few), rel=RELATIVE)


def test_frechet_distance_of_known_gaussians() -> None:
    """For diagonal covariances it is the squared distance of means and of standard deviations."""
    rng = np.random.default_rng(0)
    first_NF = rng.standard_normal((4000, 3)) * [1.0, 2.0, 0.5]
    expected = ((first_NF.mean(0) * 2 + 1) ** 2).sum() + 4 * first_NF.var(0, ddof=1).sum()
    assert distance(first_NF, first_NF * 3 + 1) == pytest.approx(expected, rel=1e-9)
    second_NF = rng.standard_normal((4000, 3)) * [2.0, 2.0, 1.5] + [3.0, 0.0, 0.0]
    assert distance(first_NF, second_NF) == pytest.approx(9 + 1 + 0 + 1, rel=0.05)


def test_frechet_distance_of_two_samples_each(digits_NF: np.ndarray) -> None:
    """Covariances of rank one: the cross term is the scalar product of their only directions."""
    a, b, c, d = digits_NF[:4].astype(np.float64)
    u, v = (a - b) / math.sqrt(2), (c - d) / math.sqrt(2)
    expected = ((a + b - c - d) ** 2).sum() / 4 + u @ u + v @ v - 2 * abs(u @ v)
    assert distance(digits_NF[:2], digits_NF[2:4]) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_constant_and_identical_sets(digits_NF: np.ndarray) -> None:
    constant_NF = np.full((10, 64), 0.25, dtype=np.float32)
    assert distance(constant_NF, constant_NF + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)
    assert distance(constant_NF, digits_NF) == pytest.approx(
        ((digits_NF.astype(np.float64).mean(0) - 0.25) ** 2).sum() + digits_NF.astype(np.float64).var(0, ddof=1).sum(),
        rel=1e-6,
    )
    for same in (constant_NF, digits_NF, digits_NF[:2], digits_NF[:20]):
        assert distance(same, same) == pytest.approx(0, abs=1e-9)


def covariance(gaussian: Gaussian) -> np.ndarray:
    return gaussian.factor_RF.T @ gaussian.factor_RF


def test_the_gaussian_is_numpys_also_far_from_the_origin_and_with_repetitions(digits_NF: np.ndarray) -> None:
    far_NF = digits_NF[:1500].astype(np.float64) + 1e6
    fitted = Gaussian.fit(far_NF)
    assert np.allclose(covariance(fitted), np.cov(far_NF, rowvar=False), atol=1e-8)
    times_N = np.random.default_rng(1).integers(0, 4, 1500)
    repeated_NF = np.repeat(digits_NF[:1500], times_N, axis=0).astype(np.float64)
    fitted = Gaussian.fit(digits_NF[:1500], times_N)
    assert np.allclose(fitted.mean_F, repeated_NF.mean(0), rtol=1e-9)
    assert np.allclose(covariance(fitted), np.cov(repeated_NF, rowvar=False), atol=1e-12)
    with pytest.raises(ValueError, match="at least two samples, not 1"):
        Gaussian.fit(digits_NF[:1])


# ---- Inception Score -------------------------------------------------------------------------------------------------


def torchmetrics_score(probabilities_NK: np.ndarray) -> float:
    metric = InceptionScore(feature=Given(), splits=1)
    metric.update(torch.tensor(probabilities_NK, dtype=torch.float64).clamp(min=1e-300).log())
    return float(metric.compute()[0])


def test_inception_score_of_digits() -> None:
    probabilities_NK = DigitNetwork.train().features(real_digits())["probabilities"]
    assert inception_score(probabilities_NK) == pytest.approx(torchmetrics_score(probabilities_NK), rel=RELATIVE)
    assert 7 < inception_score(probabilities_NK) < 10
    two_NK = probabilities_NK[:2]
    assert inception_score(two_NK) == pytest.approx(torchmetrics_score(two_NK), rel=RELATIVE)


def test_inception_score_is_a_mean_over_splits() -> None:
    sizes = (INCEPTION_SPLIT, INCEPTION_SPLIT, 700)
    probabilities_NK = np.random.default_rng(2).dirichlet(np.full(5, 0.2), sum(sizes)).astype(np.float32)
    parts = np.split(probabilities_NK, np.cumsum(sizes)[:-1])
    expected = np.mean([torchmetrics_score(part) for part in parts])
    assert inception_score(probabilities_NK) == pytest.approx(expected, rel=RELATIVE)
    times_N = np.random.default_rng(3).integers(0, 3, sum(sizes))
    times_of = np.split(times_N, np.cumsum(sizes)[:-1])
    repeated = [torchmetrics_score(np.repeat(part, times, axis=0)) for part, times in zip(parts, times_of, strict=True)]
    assert inception_score(probabilities_NK, times_N) == pytest.approx(np.mean(repeated), rel=RELATIVE)


def test_inception_score_of_extremes() -> None:
    """All alike: 1. All certain and evenly spread: the number of classes."""
    assert inception_score(np.tile([[0.7, 0.2, 0.1]], (9, 1))) == pytest.approx(1, abs=1e-9)
    assert inception_score(np.tile(np.eye(10), (3, 1))) == pytest.approx(10, rel=1e-9)


# ---- precision and recall --------------------------------------------------------------------------------------------


def precision_recall(generated_NF: np.ndarray, real_MF: np.ndarray) -> tuple[float, float]:
    precision = inside(generated_NF, real_MF, radii(real_MF)).mean()
    return float(precision), float(inside(real_MF, generated_NF, radii(generated_NF)).mean())


def slow_precision(generated_NF: np.ndarray, real_MF: np.ndarray) -> float:
    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)))

    radius_M = [sorted(gap(x, y) for y in real_MF)[3] for x in real_MF]
    found = [any(gap(x, y) <= radius for y, radius in zip(real_MF, radius_M, strict=True)) for x in generated_NF]
    return float(np.mean(found))


def test_precision_and_recall_of_digits(digits_NF: np.ndarray, held_out_NF: np.ndarray) -> None:
    expected = compute_prdc(digits_NF, held_out_NF, nearest_k=3)
    found = precision_recall(held_out_NF, digits_NF)
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=RELATIVE)
    assert min(found) > 0.3 and max(found) < 1
    few = (held_out_NF[:12], digits_NF[:15])
    assert precision_recall(*few) == pytest.approx((slow_precision(*few), slow_precision(few[1], few[0])), rel=RELATIVE)


def test_precision_and_recall_of_adversarial_sets(digits_NF: np.ndarray) -> None:
    constant_NF = np.full((6, 64), 1 / 3, dtype=np.float32)
    same = digits_NF[:50]
    assert precision_recall(same, same) == precision_recall(constant_NF, constant_NF) == (1, 1)
    assert precision_recall(same, same + 100) == precision_recall(constant_NF, constant_NF + 0.01) == (0, 0)
    # Four copies of each digit: all radii are nought, and only copies are inside.
    copies_NF = np.repeat(digits_NF[:10], 4, axis=0)
    assert precision_recall(np.concatenate([digits_NF[:10], digits_NF[100:110]]), copies_NF)[0] == 0.5
    # All generated samples are one: perfectly precise, and nothing is recalled but that one.
    assert precision_recall(np.tile(digits_NF[:1], (5, 1)), digits_NF[:100]) == (1, pytest.approx(0.01))


def test_three_samples_have_no_third_neighbour(digits_NF: np.ndarray) -> None:
    with pytest.raises(ValueError, match="3 samples have no neighbour number 3"):
        radii(digits_NF[:3])

"""Paired figures against torchmetrics and plain numpy, on real digits and adversarial pairs.

Shape suffixes: N images.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from moeca_dist.demo.data import real_digits
from moeca_dist.evaluation.evaluate import evaluate
from moeca_dist.evaluation.paired import MAX_PSNR_DB
from moeca_dist.evaluation.request import Settings

RELATIVE = 1e-3


def figures(folder: Path, images_NHWC: np.ndarray, reference_NHWC: np.ndarray, **options) -> dict[str, float]:
    np.savez(folder / "images.npz", images_NHWC)
    np.savez(folder / "reference.npz", reference_NHWC)
    settings = Settings(folder / "images.npz", folder / "reference.npz", **{"resamples": 0, **options})
    return {name: figure.value for name, figure in evaluate(settings).figures.items()}


def expected_figures(images_NHWC: np.ndarray, reference_NHWC: np.ndarray) -> dict[str, float]:
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 for images in (images_NHWC, reference_NHWC))
    _, ssim_NCHW = structural_similarity_index_measure(x, y, data_range=1.0, sigma=1.5, return_full_image=True)
    # torchmetrics mirrors images at the border; the paper's mean is over the positions where the window fits.
    border = slice(5, -5)
    psnr_N = [float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in zip(x, y, strict=True)]
    return {
        "psnr_db": float(np.minimum(psnr_N, MAX_PSNR_DB).mean()),
        "pooled_psnr_db": float(peak_signal_noise_ratio(x, y, data_range=1.0)),
        "ssim": float(ssim_NCHW[..., border, border].mean()),
        "rel_l2": float((x - y).norm() / y.norm()),
    }


def moved(images_NHWC: np.ndarray, amount: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-amount, amount + 1, images_NHWC.shape)
    return (images_NHWC.astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("amount", [1, 20, 255])
def test_figures_of_digits(tmp_path: Path, amount: int) -> None:
    digits_NHWC = real_digits()[:300]
    other_NHWC = moved(digits_NHWC, amount)
    expected = expected_figures(other_NHWC, digits_NHWC)
    assert figures(tmp_path, other_NHWC, digits_NHWC) == pytest.approx(expected, rel=RELATIVE)


def test_figures_of_colours_and_of_two_samples(tmp_path: Path) -> None:
    images_NHWC = np.random.default_rng(1).integers(0, 256, (2, 24, 31, 3), dtype=np.uint8)
    other_NHWC = moved(images_NHWC, 9)
    expected = expected_figures(other_NHWC, images_NHWC)
    assert figures(tmp_path, other_NHWC, images_NHWC) == pytest.approx(expected, rel=RELATIVE)


def test_figures_of_constant_images(tmp_path: Path) -> None:
    """Closed forms: SSIM is the luminance term, PSNR that of the distance."""
    grey, lighter = (np.full((3, 16, 16, 1), value, dtype=np.uint8) for value in (51, 102))
    expected = {
        "psnr_db": -10 * math.log10(0.2**2),
        "pooled_psnr_db": -10 * math.log10(0.2**2),
        "ssim": (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4),
        "rel_l2": 1.0,
    }
    assert figures(tmp_path, lighter, grey) == pytest.approx(expected, rel=1e-9)
    black = np.zeros_like(grey)
    assert figures(tmp_path, grey, black)["rel_l2"] == math.inf
    assert figures(tmp_path, black, black) == pytest.approx(
        {"psnr_db": MAX_PSNR_DB, "pooled_psnr_db": MAX_PSNR_DB, "ssim": 1, "rel_l2": 0}
    )


def test_figures_of_identical_images(tmp_path: Path) -> None:
    digits_NHWC = real_digits()[:50]
    found = figures(tmp_path, digits_NHWC, digits_NHWC, features="digits")
    score = found.pop("inception_score")
    assert 5 < score < 10
    exact = {"psnr_db": MAX_PSNR_DB, "pooled_psnr_db": MAX_PSNR_DB, "ssim": 1, "rel_l2": 0}
    assert found == pytest.approx(exact | {"frechet": 0, "sfid": 0, "precision": 1, "recall": 1}, abs=1e-9)

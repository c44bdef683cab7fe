"""Paired metrics against slow loops and closed forms.

Shape suffixes: N images, C channels, H and W pixels.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist.evaluation.paired import MAX_PSNR_DB, PairedQuality, psnr_db, squared_error, ssim, unit_images


def images(seed: int, *shape_NCHW: int) -> Tensor:
    return torch.rand(*shape_NCHW, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_ssim(x_HW: np.ndarray, y_HW: np.ndarray) -> float:
    """Equations 13 to 17 of the paper, window position by window position."""
    side = min(11, *x_HW.shape)
    side -= 1 - side % 2
    weights = np.array(
        [
            [math.exp(-((i - side // 2) ** 2 + (j - side // 2) ** 2) / (2 * 1.5**2)) for j in range(side)]
            for i in range(side)
        ]
    )
    weights /= weights.sum()
    values = []
    for top in range(x_HW.shape[0] - side + 1):
        for left in range(x_HW.shape[1] - side + 1):
            x = x_HW[top : top + side, left : left + side]
            y = y_HW[top : top + side, left : left + side]
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_x * mean_y + c1)
                * (2 * covariance + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            )
    return float(np.mean(values))


@settings(max_examples=15, deadline=None)
@given(height=st.integers(2, 15), width=st.integers(2, 15), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_ssim_is_that_of_the_paper(height: int, width: int, channels: int, seed: int) -> None:
    x = images(seed, 2, channels, height, width)
    y = (x + 0.3 * images(seed + 1, 2, channels, height, width)).clamp(0, 1)
    expected = [
        np.mean([slow_ssim(a, b) for a, b in zip(*pair, strict=True)])
        for pair in zip(x.numpy(), y.numpy(), strict=True)
    ]
    assert np.allclose(ssim(x, y), expected, atol=1e-10)


def test_identical_images_are_perfect() -> None:
    x = images(0, 3, 1, 16, 16)
    quality = PairedQuality()
    quality.add(x, x)
    result = quality.result()
    assert (result.psnr_db, result.pooled_psnr_db, result.rel_l2) == (MAX_PSNR_DB, MAX_PSNR_DB, 0.0)
    assert result.ssim == pytest.approx(1)


def test_a_constant_error_has_the_psnr_of_its_size() -> None:
    x = images(1, 2, 3, 8, 8) / 2
    assert np.allclose(psnr_db(squared_error(x + 0.1, x)), 20)
    assert np.allclose(squared_error(x + 0.1, x), 0.01)


def test_mean_and_pooled_psnr_differ_where_images_differ() -> None:
    """20 dB and 40 dB: the mean is 30, the pooled figure that of the mean squared error."""
    x = torch.full((2, 1, 16, 16), 0.5, dtype=torch.float64)
    y = x + torch.tensor([0.1, 0.01], dtype=torch.float64).view(2, 1, 1, 1)
    quality = PairedQuality()
    quality.add(y, x)
    assert quality.result().psnr_db == pytest.approx(30)
    assert quality.result().pooled_psnr_db == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2))
    assert quality.result().rel_l2 == pytest.approx(math.sqrt((0.01 + 0.0001) / (2 * 0.25)))


def test_batches_add_up() -> None:
    x, y = images(2, 7, 1, 16, 16), images(3, 7, 1, 16, 16)
    whole, parts = PairedQuality(), PairedQuality()
    whole.add(x, y)
    for start in (0, 3, 5):
        stop = {0: 3, 3: 5, 5: 7}[start]
        parts.add(x[start:stop], y[start:stop])
    for name, value in vars(whole.result()).items():
        assert getattr(parts.result(), name) == pytest.approx(value, rel=1e-12), name


def test_samples_of_both_kinds_become_the_same_images() -> None:
    pixels = torch.randint(0, 256, (2, 5, 6, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    floats = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(unit_images(pixels.numpy()), unit_images(floats), atol=1e-7)
    assert unit_images(torch.tensor([[[[-1.5, 3.0]]]])).tolist() == [[[[0.0, 1.0]]]]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape \[N, C, H, W\]"):
        ssim(images(0, 1, 1, 8, 8), images(0, 1, 1, 8, 9))
    with pytest.raises(ValueError, match="no images were compared"):
        PairedQuality().result()
    with pytest.raises(ValueError, match="four dimensions"):
        unit_images(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="uint8 or floating point"):
        unit_images(torch.zeros(1, 2, 2, 1, dtype=torch.int64))


def test_black_references() -> None:
    black = torch.zeros(1, 1, 8, 8)
    quality = PairedQuality()
    quality.add(black, black)
    assert quality.result().rel_l2 == 0
    quality.add(black + 0.5, black)
    assert quality.result().rel_l2 == math.inf

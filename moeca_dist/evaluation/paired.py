"""Paired quality: the distance of samples from the exact ones of the same noise.

All metrics are on images in [0, 1]. Compare float samples if there are any: rounding to grey levels adds an error of
its own.

Shape suffixes: N images, C channels, H and W pixels, K window side.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Identical images count as this much, so that one of them does not make the mean infinite; no fp32 pair gets near it.
MAX_PSNR_DB = 200.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def unit_images(samples: Tensor | NDArray[np.generic]) -> Tensor:
    """Convert samples to float64 images [N, C, H, W] in [0, 1]. Values outside are clamped, as they are for display.

    Args:
        samples: uint8 [N, H, W, C] as in ``samples.npz``, or float [N, C, H, W] in [-1, 1] as from solvers.

    Raises ValueError for other shapes and types.
    """
    images = torch.as_tensor(samples)
    if images.ndim != 4:
        raise ValueError(f"images have four dimensions, not the shape {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images.permute(0, 3, 1, 2).double() / 255
    if not images.is_floating_point():
        raise ValueError(f"images are uint8 or floating point, not {images.dtype}")
    return ((images.double() + 1) / 2).clamp(0, 1)


def squared_error(images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
    """Return the mean squared error of each image, float64 [N]."""
    _check_pair(images_NCHW, reference_NCHW)
    return (images_NCHW.double() - reference_NCHW.double()).square().flatten(1).mean(1)


def psnr_db(squared_error_N: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio for a peak of 1, ``-10 log10(MSE)``, at most ``MAX_PSNR_DB``."""
    return -10 * squared_error_N.double().clamp(min=10 ** (-MAX_PSNR_DB / 10)).log10()


def ssim(images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
    """Return the structural similarity of each image, float64 [N].

    It is the mean of the SSIM map over positions and channels. The map follows Wang, Bovik, Sheikh & Simoncelli 2004,
    section III.B and C. The window is an 11 x 11 Gaussian with sigma 1.5 and sum 1. K1 is 0.01, K2 is 0.03, and the
    dynamic range is 1. Only positions count at which the window fits into the image. Images with a side below 11 pixels
    get the largest odd window that fits, with the same sigma.
    """
    _check_pair(images_NCHW, reference_NCHW)
    x_NHW, y_NHW = (images.double().flatten(0, 1)[:, None] for images in (images_NCHW, reference_NCHW))
    window_K = gaussian_window(min(images_NCHW.shape[2:]))
    local = torch.cat([x_NHW, y_NHW, x_NHW * x_NHW, y_NHW * y_NHW, x_NHW * y_NHW])
    local = F.conv2d(F.conv2d(local, window_K.view(1, 1, 1, -1)), window_K.view(1, 1, -1, 1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = local.chunk(5)
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (mean_xx - mean_x**2 + mean_yy - mean_y**2 + c2)
    return (luminance * structure).view(*images_NCHW.shape[:2], -1).mean((1, 2))


def gaussian_window(shortest_side: int) -> Tensor:
    """Return one axis of the separable SSIM window, float64 [K]."""
    side = min(SSIM_WINDOW, shortest_side - 1 + shortest_side % 2)
    offset_K = torch.arange(side, dtype=torch.float64) - side // 2
    window_K = (-(offset_K**2) / (2 * SSIM_SIGMA**2)).exp()
    return window_K / window_K.sum()


@dataclass(frozen=True)
class Quality:
    """Paired figures of a set of images.

    - ``psnr_db``: mean over images of each image's PSNR.
    - ``pooled_psnr_db``: PSNR of the mean squared error of all images.
    - ``rel_l2``: norm of the difference over norm of the reference, all images together. It is infinite only if the
      reference is black throughout and the images are not.
    - ``ssim``: mean over images.
    """

    num_images: int
    psnr_db: float
    pooled_psnr_db: float
    rel_l2: float
    ssim: float


class PairedQuality:
    """The sums of paired metrics, added batch by batch. Images are never held."""

    def __init__(self) -> None:
        self._num_images = 0
        self._psnr_db = self._ssim = self._squared_error = self._error_energy = self._energy = 0.0

    def add(self, images_NCHW: Tensor, reference_NCHW: Tensor) -> None:
        """Compare a batch of images in [0, 1] with the references of the same noise.

        Raises ValueError if shapes differ.
        """
        squared_error_N = squared_error(images_NCHW, reference_NCHW)
        self._num_images += len(squared_error_N)
        self._psnr_db += float(psnr_db(squared_error_N).sum())
        self._ssim += float(ssim(images_NCHW, reference_NCHW).sum())
        self._squared_error += float(squared_error_N.sum())
        self._error_energy += float((images_NCHW.double() - reference_NCHW.double()).square().sum())
        self._energy += float(reference_NCHW.double().square().sum())

    def result(self) -> Quality:
        """Return the figures over all added images. Raises ValueError if there are none."""
        if self._num_images == 0:
            raise ValueError("no images were compared: add at least one pair")
        count = self._num_images
        pooled_db = float(psnr_db(torch.tensor(self._squared_error / count, dtype=torch.float64)))
        rel_l2 = 0.0
        if self._error_energy:
            rel_l2 = math.sqrt(self._error_energy / self._energy) if self._energy else math.inf
        return Quality(count, self._psnr_db / count, pooled_db, rel_l2, self._ssim / count)


def _check_pair(images_NCHW: Tensor, reference_NCHW: Tensor) -> None:
    if images_NCHW.shape != reference_NCHW.shape or images_NCHW.ndim != 4:
        raise ValueError(
            f"paired images have the same shape [N, C, H, W], not {list(images_NCHW.shape)} and "
            f"{list(reference_NCHW.shape)}"
        )

"""Real handwritten digits as 16x16 training images.

The source is the UCI "Optical Recognition of Handwritten Digits" test set that ships inside scikit-learn. It has 1797
images of 8x8 pixels. Each pixel is the ink count (0..16) of a 4x4 cell of a 32x32 scan.

Shape suffixes: N images, C channels (1), H and W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

IMAGE_SIZE = 16
NUM_CLASSES = 10
NUM_HELD_OUT = 297

_SOURCE_SIZE = 8
_SOURCE_PADDING = 2  # blank source pixels around the digit, so that moved strokes fade out and are not smeared
_SUPERSAMPLING = 2  # strokes are sharpened at 32x32 and averaged down, which keeps their edges anti-aliased
_CONTRAST = 6.0  # slope of the sigmoid that turns the blur of the upsampling back into strokes

# Half-ranges of the uniform draws of `augment`; small enough that a reader of the plain digits still reads them.
_MAX_ROTATION_RAD = 0.09
_MAX_SHEAR = 0.08
_MAX_SCALE = 0.04
_MAX_ASPECT = 0.03
_MAX_SHIFT = 0.05  # in half image widths: 0.4 pixels of 16


@dataclass(frozen=True)
class Digits:
    """Source digits and their labels.

    - ``ink_NHW``: float32 [N, 8, 8] in [0, 1]. 1 is full ink.
    - ``labels_N``: int64 in 0..9.
    - ``ids_N``: int64, the index of each digit in scikit-learn's data set.
    """

    ink_NHW: Tensor
    labels_N: Tensor
    ids_N: Tensor

    def __len__(self) -> int:
        return self.labels_N.shape[0]


def load_split(seed: int = 0) -> tuple[Digits, Digits]:
    """Load the training and the held-out part: 1500 and 297 digits, disjoint, the same for the same seed."""
    source = load_digits()
    ink_NHW = torch.tensor(source.images, dtype=torch.float32) / 16
    labels_N = torch.tensor(source.target, dtype=torch.int64)
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    held_out, training = order_N[:NUM_HELD_OUT], order_N[NUM_HELD_OUT:]
    return tuple(Digits(ink_NHW[ids], labels_N[ids], ids) for ids in (training, held_out))  # type: ignore[return-value]


def render(ink_NHW: Tensor, warp_N23: Tensor | None = None) -> Tensor:
    """Draw 8x8 digits at 16x16, optionally moved by one affine map each.

    Args:
        ink_NHW: float32 [N, 8, 8] in [0, 1].
        warp_N23: float32 [N, 2, 3]. It maps output to source coordinates, both in [-1, 1] over the image.

    Returns:
        float32 [N, 1, 16, 16] in [-1, 1]. -1 is paper, 1 is full ink.
    """
    num_images = ink_NHW.shape[0]
    if warp_N23 is None:
        warp_N23 = torch.eye(2, 3).expand(num_images, 2, 3)
    pad = _SOURCE_PADDING
    padded_NCHW = F.pad(ink_NHW[:, None], (pad, pad, pad, pad))
    fine = IMAGE_SIZE * _SUPERSAMPLING
    # The unpadded digit spans only this share of the padded one's [-1, 1] coordinates.
    grid_NHW2 = F.affine_grid(
        warp_N23 * (_SOURCE_SIZE / (_SOURCE_SIZE + 2 * pad)), [num_images, 1, fine, fine], align_corners=False
    )
    # Bicubic, because bilinear interpolation turns diagonal strokes of 8x8 digits into staircases.
    ink_NCHW = F.grid_sample(padded_NCHW, grid_NHW2, mode="bicubic", padding_mode="border", align_corners=False)
    low, high = torch.sigmoid(torch.tensor([-_CONTRAST / 2, _CONTRAST / 2]))
    ink_NCHW = ((torch.sigmoid(_CONTRAST * (ink_NCHW - 0.5)) - low) / (high - low)).clamp(0, 1)
    return F.avg_pool2d(ink_NCHW, _SUPERSAMPLING) * 2 - 1


def augment(ink_NHW: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each digit with its own small rotation, shear, scale, aspect and subpixel shift.

    The result depends on the input and the generator's state alone.

    Args:
        ink_NHW: float32 [N, 8, 8] in [0, 1].

    Returns:
        float32 [N, 1, 16, 16] in [-1, 1].
    """
    uniform_N6 = torch.rand(ink_NHW.shape[0], 6, generator=generator) * 2 - 1
    angle_N = uniform_N6[:, 0] * _MAX_ROTATION_RAD
    shear_N = uniform_N6[:, 1] * _MAX_SHEAR
    # Only ever smaller: the source digits fill the full height, larger ones would lose the ends of their strokes.
    zoom_N = 1 + (uniform_N6[:, 2] + 1) * _MAX_SCALE
    aspect_N = 1 + uniform_N6[:, 3] * _MAX_ASPECT
    shift_N2 = uniform_N6[:, 4:] * _MAX_SHIFT
    cos_N, sin_N = angle_N.cos(), angle_N.sin()
    rotation_N22 = torch.stack([cos_N, -sin_N, sin_N, cos_N], dim=1).view(-1, 2, 2)
    zero_N = torch.zeros_like(shear_N)
    stretch_N22 = torch.stack([zoom_N * aspect_N, shear_N, zero_N, zoom_N / aspect_N], dim=1).view(-1, 2, 2)
    return render(ink_NHW, torch.cat([rotation_N22 @ stretch_N22, shift_N2[:, :, None]], dim=2))


def to_uint8(x_NCHW: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 [N, H, W, C], the layout of ``samples.npz``. Values outside are clipped."""
    return ((x_NCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def real_digits() -> NDArray[np.uint8]:
    """Return all real digits, each drawn once in the way of the training images: uint8 [1797, 16, 16, 1]."""
    ink_NHW = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    return np.asarray(to_uint8(augment(ink_NHW, torch.Generator().manual_seed(0))))

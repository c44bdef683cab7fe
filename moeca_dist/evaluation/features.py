"""Feature networks: what distances between sets of images are measured in.

Shape suffixes: N images, H and W pixels, C channels, F features.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeca_dist.demo.judge import DigitNetwork
from moeca_dist.errors import UserError
from moeca_dist.evaluation.inception import Inception, load_inception

DIGITS = "digits"
POOLED, SPATIAL, PROBABILITIES = "pooled", "spatial", "probabilities"


class FeatureNetwork(Protocol):
    """``widths``: the number of values per image of each of the layers pooled, spatial and probabilities."""

    @property
    def widths(self) -> Mapping[str, int]: ...

    def features(self, images_NHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[np.float32]]:
        """uint8 images to float32 [N, F] of every layer."""


def open_network(name: str, device: str, shape_HWC: tuple[int, int, int]) -> FeatureNetwork:
    """The demo's own network (``digits``) or the Inception network in the file ``name``.

    Raises UserError where the file is none, or where the network does not take images [H, W, C].
    """
    if name != DIGITS:
        inception: Inception = load_inception(name, device)
        return inception
    if shape_HWC != DigitNetwork.shape_HWC:
        raise UserError(
            f"--features {DIGITS} reads images of {_size(DigitNetwork.shape_HWC)}, not {_size(shape_HWC)}: give an "
            "Inception file"
        )
    return DigitNetwork.train()


def _size(shape_HWC: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape_HWC))

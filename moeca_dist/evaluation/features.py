"""Feature networks, in whose features distances between sets of images are measured.

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
    """A network with three layers of features: pooled, spatial and probabilities.

    ``widths`` holds the number of values per image of each layer.
    """

    @property
    def widths(self) -> Mapping[str, int]: ...

    def features(self, images_NHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[np.float32]]:
        """Compute float32 [N, F] of every layer from uint8 images."""


def open_network(name: str, device: str, shape_HWC: tuple[int, int, int]) -> FeatureNetwork:
    """Open the demo's own network (``digits``) or the Inception network in the file ``name``.

    Raises UserError if the file is of another kind, or if the network does not take images [H, W, C].
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

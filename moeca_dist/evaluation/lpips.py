"""LPIPS from the lpips package and a local file of the network behind it (Zhang et al. 2018, section 3).

Shape suffixes: N images, C channels, H and W pixels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_dist.errors import UserError
from moeca_dist.evaluation.inception import HOW_TO_INSTALL

SMALLEST_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}  # below, a pooling layer has nothing left to pool

# A parameter that tells each network from its relatives.
_TELLING = {
    "alex": ("features.0.weight", (64, 3, 11, 11)),
    "vgg": ("features.26.weight", (512, 512, 3, 3)),
    "squeeze": ("features.12.squeeze.weight", (64, 512, 1, 1)),
}


class Perceptual:
    """The LPIPS distance of image pairs.

    The calibrated layer weights come with the package. The network's weights come from the file.
    """

    def __init__(self, path: str, device: str) -> None:
        """Load the network.

        Args:
            path: torchvision's state dict of ``alexnet``, ``vgg16`` or ``squeezenet1_1``. Its keys tell which one it
                is.

        Raises UserError for a missing package or file, and for a file of another kind.
        """
        weights = _read(path)
        try:
            from lpips import LPIPS
        except (ImportError, RuntimeError) as error:
            # RuntimeError: a torchvision, which lpips imports, that was built for another torch.
            raise UserError(
                f"--lpips needs the lpips package ({error}): {HOW_TO_INSTALL}, with the torchvision that belongs to "
                "the installed torch"
            ) from None
        self.name = _which(path, weights)
        self._device = device
        # Without its own download: a random network, filled from the file.
        self._model: Any = LPIPS(net=self.name, pnet_rand=True, verbose=False)
        renamed = {name: weights[f"features.{_position(name)}"] for name in self._model.net.state_dict()}
        self._model.net.load_state_dict(renamed)
        self._model.to(device).requires_grad_(False)

    def check_size(self, shape_HWC: tuple[int, int, int]) -> None:
        """Raise UserError for images that are too small for the network's pooling."""
        least, side = SMALLEST_SIDE[self.name], min(shape_HWC[:2])
        if side < least:
            raise UserError(
                f"LPIPS with {self.name} needs sides of {least} pixels, these images have {side}: leave --lpips away"
            )

    @torch.inference_mode()
    def distance(self, images_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
        """Compute the distance of each pair, float64 [N]. Images are in [0, 1], with one channel or three."""
        first, second = (
            (images.expand(-1, 3, -1, -1) * 2 - 1).float().to(self._device) for images in (images_NCHW, reference_NCHW)
        )
        return torch.as_tensor(self._model(first, second)).flatten().double().cpu()


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give torchvision's alexnet, vgg16 or squeezenet1_1 weights")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    except Exception:
        # torch.load has no exception of its own for files that are something else.
        raise UserError(f"{path} is no file of weights: give torchvision's alexnet, vgg16 or squeezenet1_1") from None


def _which(path: str, weights: dict[str, Tensor]) -> str:
    for net, (name, shape) in _TELLING.items():
        if name in weights and tuple(weights[name].shape) == shape:
            return net
    raise UserError(f"{path} is neither alexnet nor vgg16 nor squeezenet1_1 as torchvision names their weights")


def _position(name: str) -> str:
    """``slice2.3.weight`` in the package is ``features.3.weight`` in torchvision's file."""
    return name.partition(".")[2]

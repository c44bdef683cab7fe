"""The Inception network with which FID, sFID and Inception Scores are published, from a local file.

Two layouts are read. One is the TorchScript file of StyleGAN's metrics (``inception-2015-12-05.pt``). The other is the
weights of pytorch-fid and torch-fidelity (``pt_inception-2015-12-05-6726825d.pth``), for which torch-fidelity builds
the network. Both resize as TensorFlow 1 does (bilinear without anti-aliasing) and scale pixels as (x - 128) / 128.
Nothing else about the images may be changed: otherwise figures cannot be compared with published ones.

Shape suffixes: N images, C channels, H and W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moeca_dist.errors import UserError

INPUT_SIDE = 299
POOLED_WIDTH = 2048
SPATIAL_CHANNELS: Final = 7  # of mixed_6/conv at 17 x 17: about as many values as pooled features (ADM's evaluator)
HOW_TO_INSTALL = "pip install 'moeca_dist[evaluation]'"
_SELF_CHECK_TOLERANCE = 1e-3


class Inception(ABC):
    """The network with pooled features (2048), spatial features and class probabilities.

    The spatial features are 7 channels of mixed_6/conv (2023 values). Probabilities leave out the bias of the last
    layer, as the field's Inception Score does.
    """

    def __init__(self, device: str, num_classes: int) -> None:
        self._device = device
        self._num_classes = num_classes

    @property
    def widths(self) -> Mapping[str, int]:
        return {"pooled": POOLED_WIDTH, "spatial": SPATIAL_CHANNELS * 17 * 17, "probabilities": self._num_classes}

    @torch.inference_mode()
    def features(self, images_NHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[np.float32]]:
        """Compute float32 features [N, F] of uint8 images of any size, with one channel or three."""
        images_NCHW = torch.from_numpy(images_NHWC).to(self._device).permute(0, 3, 1, 2)
        pooled_NF, spatial_NCHW, logits_NK = self._forward(images_NCHW.expand(-1, 3, -1, -1))
        return {
            "pooled": _values(pooled_NF),
            # Row, column, channel: the order in which ADM's files keep mu_s and sigma_s.
            "spatial": _values(spatial_NCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)),
            "probabilities": _values(logits_NK.softmax(1)),
        }

    @abstractmethod
    def _forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 images to pooled features, the map of mixed_6/conv, and logits without bias."""


def _values(features_NF: Tensor) -> NDArray[np.float32]:
    return np.asarray(features_NF.float().cpu().numpy())


def load_inception(path: str, device: str) -> Inception:
    """Load the network. Raises UserError if there is no file, or if it has neither of the two layouts."""
    if not Path(path).is_file():
        raise UserError(
            f"{path} does not exist: give a local Inception file (inception-2015-12-05.pt or "
            "pt_inception-2015-12-05-6726825d.pth), or --features digits"
        )
    try:
        script = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError):
        return _load_weights(path, device)
    try:
        return _Script(script.eval(), device)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path} is TorchScript, but not the Inception network of inception-2015-12-05.pt "
            f"({str(error).strip().splitlines()[0]})"
        ) from None


# ---- StyleGAN's TorchScript ------------------------------------------------------------------------------------------


class _Script(Inception):
    """Runs the layers of the script one by one, because hooks do not fire inside a script; checked against its own."""

    def __init__(self, script: Any, device: str) -> None:
        self._layers = dict(script.layers.named_children())
        self._weight_KF: Tensor = script.output.weight
        super().__init__(device, len(self._weight_KF))
        if "mixed_6" not in self._layers:
            raise AttributeError("it has no layer mixed_6")
        images_NCHW = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(0)).byte()
        with torch.inference_mode():
            expected = script(images_NCHW.to(device), return_features=True)
            found, *_ = self._forward(images_NCHW.to(device))
        if not (found - expected).norm() <= _SELF_CHECK_TOLERANCE * expected.norm():
            raise RuntimeError("its layers in a row give other features than the script as a whole")

    def _forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = tensorflow_resize(images_NCHW.float()).sub_(128).div_(128)
        spatial = None
        for name, layer in self._layers.items():
            if name == "mixed_6":
                spatial = layer.conv(x)
            x = layer(x)
        assert spatial is not None
        pooled = x.reshape(-1, POOLED_WIDTH)
        return pooled, spatial, F.linear(pooled, self._weight_KF)


def tensorflow_resize(images_NCHW: Tensor) -> Tensor:
    """Scale to 299 x 299 as TensorFlow 1 does, bilinearly: pixel i of the output is at i x scale of the input."""
    height, width = images_NCHW.shape[2:]
    theta = torch.eye(2, 3, device=images_NCHW.device)
    # affine_grid puts pixel centres half a pixel in on either side; this moves them to the corner.
    theta[0, 2] = 1 / width - 1 / INPUT_SIDE
    theta[1, 2] = 1 / height - 1 / INPUT_SIDE
    grid_NHW2 = F.affine_grid(theta[None], [1, 1, INPUT_SIDE, INPUT_SIDE], align_corners=False)
    grid_NHW2 = grid_NHW2.expand(len(images_NCHW), -1, -1, -1)
    return F.grid_sample(images_NCHW, grid_NHW2, mode="bilinear", padding_mode="border", align_corners=False)


# ---- torch-fidelity's weights ----------------------------------------------------------------------------------------


class _Weights(Inception):
    """torch-fidelity's network; the map of mixed_6/conv (``Mixed_6d.branch1x1``) is picked up on the way."""

    def __init__(self, network: Any, device: str) -> None:
        super().__init__(device, network.fc.out_features)
        self._network = network.to(device)

    def _forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spatial: list[Tensor] = []
        hook = self._network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _x, y: spatial.append(y))
        try:
            pooled, logits = self._network(images_NCHW)
        finally:
            hook.remove()
        return pooled, spatial[0], logits


def _load_weights(path: str, device: str) -> Inception:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        is_inception = tuple(weights["fc.weight"].shape) == (1008, POOLED_WIDTH)
    except Exception:
        # torch.load has no exception of its own for files that are something else.
        is_inception = False
    if not is_inception:
        raise UserError(
            f"{path} is neither the TorchScript file inception-2015-12-05.pt nor the weights "
            "pt_inception-2015-12-05-6726825d.pth: give one of them"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        # RuntimeError: a torchvision, which torch-fidelity imports, that was built for another torch.
        raise UserError(
            f"{path} holds weights, for which torch-fidelity is needed ({error}): {HOW_TO_INSTALL}, with the "
            "torchvision that belongs to the installed torch"
        ) from None
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
        )
    except RuntimeError as error:
        raise UserError(f"{path} is not the Inception network ({str(error).splitlines()[0]})") from None
    return _Weights(network, device)

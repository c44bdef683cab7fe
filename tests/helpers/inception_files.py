"""A small network behind the interface of ``inception-2015-12-05.pt``: same calls, same names, other layers.

Shape suffixes: N images, C channels, H and W pixels, F features.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 12


class Mixed(nn.Module):
    """A block of two branches; the first one is called ``conv``, as in the published network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())
        self.other = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.other(x)], dim=1)


class Small(nn.Module):
    """``flipped`` makes the whole differ from its layers in a row."""

    def __init__(self, flipped: bool = False) -> None:
        super().__init__()
        self.flipped = flipped
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 8, 19, stride=17, padding=2))
        self.layers.add_module("mixed_6", Mixed(8))
        # Pooled before it is widened: the other way round takes more memory than any image.
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.layers.add_module("mixed_7", nn.Conv2d(16, 2048, 1))
        self.output = nn.Linear(2048, NUM_CLASSES)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        batch_size, channels, height, width = img.shape
        theta = torch.eye(2, 3, device=img.device)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        size = [batch_size, channels, 299, 299]
        grid = F.affine_grid(theta[None].repeat(batch_size, 1, 1), size, align_corners=False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        x = (x - 128) / 128
        if self.flipped:
            x = x.flip(2)
        features = self.layers(x).reshape(-1, 2048)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


def write_script(path: Path, network: nn.Module | None = None) -> Path:
    """A TorchScript file of the network, the same at every call."""
    torch.manual_seed(0)
    torch.jit.script(network or Small()).save(str(path))
    return path

"""Building blocks shared by the DiT-MoE families: embeddings, adaLN blocks, the output layer.

Parameter names follow the published checkpoints, so that loading is a copy by name.

Shape suffixes: B images, C channels, H and W pixels, T tokens of one image, D hidden size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeca_dist.cache.block import BlockStep
from moeca_dist.models.attention import Attention, RotaryTable
from moeca_dist.models.cached_block import CachedBlock
from moeca_dist.models.modulation import Modulation, modulate, normalise
from moeca_dist.moe.layer import MoELayer
from moeca_dist.timing import UNTIMED, Timer

TIME_FREQUENCIES = 256
TIME_MAX_PERIOD = 10_000


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, T, D], patches in row-major order."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


def timestep_features(t_B: Tensor) -> Tensor:
    """Sinusoidal features [B, 256] in fp32, cosines first, of the raw time (no factor of 1000)."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * torch.exp(-math.log(TIME_MAX_PERIOD) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(timestep_features(t_B).to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """One row per class and a last one for the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class DenseMLP(nn.Module):
    """The dense feed-forward of interleaved models: Linear, SiLU, Linear, with biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x_BTD)))


class AdaLNBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition c = time + label.

    ``feed_forward_name`` is the attribute name under which published files keep the feed-forward.
    """

    def __init__(self, hidden_size: int, attention: Attention, feed_forward: nn.Module, feed_forward_name: str) -> None:
        super().__init__()
        self.attn = attention
        self.add_module(feed_forward_name, feed_forward)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self._feed_forward_name = feed_forward_name

    @property
    def feed_forward(self) -> nn.Module:
        """A MoE layer or a dense MLP."""
        return self.get_submodule(self._feed_forward_name)

    def modulation(self, c_BD: Tensor) -> Modulation:
        return Modulation(*self.adaLN_modulation(c_BD).chunk(6, dim=-1))

    def forward(
        self,
        x_BTD: Tensor,
        c_BD: Tensor,
        rotary: RotaryTable | None,
        cache: BlockStep | None = None,
        timer: Timer = UNTIMED,
    ) -> Tensor:
        """``cache=None`` computes everything: the exact path, measured with ``timer``."""
        modulation = self.modulation(c_BD)
        if cache is not None:
            return CachedBlock(self.attn, self.feed_forward, modulation, rotary, cache).forward(x_BTD)
        with timer.section("attention"):
            attended_BTD = self.attn(modulation.to_attention(x_BTD), rotary)
        after_BTD, entering_BTD = modulation.enter_feed_forward(x_BTD, attended_BTD)
        if isinstance(self.feed_forward, MoELayer):
            with timer.section("experts"):
                fed_BTD = self.feed_forward(entering_BTD)
                return modulation.after_feed_forward(after_BTD, fed_BTD)
        with timer.section("dense"):
            return modulation.after_feed_forward(after_BTD, self.feed_forward(entering_BTD))


class FinalLayer(nn.Module):
    """[B, T, D] -> [B, T, patch * patch * C_out], channels fastest."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        return self.linear(modulate(normalise(x_BTD), shift, scale))


def unpatchify(patches_BTP: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """[B, rows * columns, p * p * C] -> [B, C, rows * p, columns * p]; each patch vector is (p, q, c)."""
    batch, _, width = patches_BTP.shape
    # The channel count is computed, not left to -1: a rank without images reshapes zero elements.
    channels = width // patch_size**2
    grid = patches_BTP.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)

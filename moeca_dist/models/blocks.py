"""Building blocks shared by the DiT-MoE families: embeddings, adaLN blocks, the output layer.

Parameter names follow the published checkpoints, so that loading is a copy by name.

Shape suffixes: B images, C channels, H and W pixels, T tokens of one image, D hidden size.
"""

import math
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeca_dist.cache.block import BlockStep
from moeca_dist.models.attention import Attention, RotaryTable
from moeca_dist.models.cached_block import CachedBlock
from moeca_dist.models.modulation import Modulation, modulate, normalise, residual
from moeca_dist.moe.layer import MoELayer
from moeca_dist.parallel.references import BlockCoding
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


class BlockParts(Protocol):
    """What a block without a cache computes beside its experts."""

    def serves(self, x_BTD: Tensor) -> bool:
        """Whether it is made for so many images."""
        ...

    def enter_feed_forward(
        self, block: "AdaLNBlock", x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, timer: Timer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream after attention and the input of the feed-forward [B, T, D], and the gate of its output [B, D]."""
        ...

    def after_dense(self, dense: nn.Module, x_BTD: Tensor, entering_BTD: Tensor, gate_BD: Tensor) -> Tensor:
        """[B, T, D]: the stream with the gated output of a dense feed-forward added."""
        ...


class EagerParts:
    """``BlockParts``, operator by operator."""

    def serves(self, x_BTD: Tensor) -> bool:
        return True

    def enter_feed_forward(
        self, block: "AdaLNBlock", x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, timer: Timer
    ) -> tuple[Tensor, Tensor, Tensor]:
        modulation = block.modulation(c_BD)
        with timer.section("attention"):
            attended_BTD = block.attn(modulation.to_attention(x_BTD), rotary)
        return *modulation.enter_feed_forward(x_BTD, attended_BTD), modulation.gate_feed_forward_BD

    def after_dense(self, dense: nn.Module, x_BTD: Tensor, entering_BTD: Tensor, gate_BD: Tensor) -> Tensor:
        return residual(x_BTD, gate_BD, dense(entering_BTD))


EAGER: Final = EagerParts()


class AdaLNBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition c = time + label.

    ``feed_forward_name`` is the attribute name under which published files keep the feed-forward. ``parts``: how what
    lies beside the experts is computed.
    """

    def __init__(self, hidden_size: int, attention: Attention, feed_forward: nn.Module, feed_forward_name: str) -> None:
        super().__init__()
        self.attn = attention
        self.add_module(feed_forward_name, feed_forward)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self._feed_forward_name = feed_forward_name
        self.parts: BlockParts = EAGER

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
        coding: BlockCoding | None = None,
    ) -> Tensor:
        """``cache=None`` computes everything: the exact path, measured with ``timer``."""
        if cache is not None:
            modulation = self.modulation(c_BD)
            return CachedBlock(self.attn, self.feed_forward, modulation, rotary, cache, coding).forward(x_BTD)
        parts = self.parts if self.parts.serves(x_BTD) else EAGER
        x_BTD, entering_BTD, gate_BD = parts.enter_feed_forward(self, x_BTD, c_BD, rotary, timer)
        if not isinstance(self.feed_forward, MoELayer):
            with timer.section("dense"):
                return parts.after_dense(self.feed_forward, x_BTD, entering_BTD, gate_BD)
        with timer.section("experts"):
            return residual(x_BTD, gate_BD, self.feed_forward(entering_BTD, coding=coding))


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

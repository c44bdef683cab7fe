"""Building blocks shared by the DiT-MoE families: embeddings, adaLN blocks, the output layer.

Parameter names follow the published checkpoints, so that loading is a copy by name.

Shape suffixes: B images, C channels, H and W pixels, T tokens of one image, D hidden size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeca_dist.cache.layer_cache import LayerCache
from moeca_dist.cache.module_cache import TokenIndex
from moeca_dist.cache.policy import ModulePolicy
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.types import Forecast, Kernels
from moeca_dist.models.attention import Attention, RotaryTable
from moeca_dist.models.cached_block import (
    attention_output,
    branch_feed_forward,
    dense_feed_forward,
    module_feed_forward,
)
from moeca_dist.models.modulation import Modulation, modulate, normalise
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.router import Router
from moeca_dist.timing import UNTIMED, Timer

TIME_FREQUENCIES = 256
TIME_MAX_PERIOD = 10_000


class PatchEmbed(nn.Module):
    """The patch embedding [B, C, H, W] -> [B, T, D], with patches in row-major order."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


def timestep_features(t_B: Tensor) -> Tensor:
    """Return sinusoidal features [B, 256] in fp32, cosines first, of the raw time (no factor of 1000)."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * torch.exp(-math.log(TIME_MAX_PERIOD) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """The embedding of the time: sinusoidal features, then an MLP."""

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
        self.feed_forward_name = feed_forward_name
        self.kernels: Kernels = REFERENCE

    @property
    def feed_forward(self) -> nn.Module:
        """Return the MoE layer or dense MLP."""
        return self.get_submodule(self.feed_forward_name)

    def modulation(self, c_BD: Tensor) -> Modulation:
        """Return the modulation that the condition gives this block."""
        return Modulation(self.kernels, *self.adaLN_modulation(c_BD).chunk(6, dim=-1))

    def forward(self, x_BTD: Tensor, c_BD: Tensor, rotary: RotaryTable | None, timer: Timer = UNTIMED) -> Tensor:
        """Return [B, T, D] with everything computed: the exact path."""
        modulation = self.modulation(c_BD)
        with timer.section("attention"):
            attn_out_BTD = self.attn(modulation.to_attention(x_BTD), rotary)
        x_BTD, ff_in_BTD = modulation.enter_feed_forward(x_BTD, Forecast(attn_out_BTD))
        with timer.section("experts" if isinstance(self.feed_forward, MoELayer) else "dense"):
            return modulation.after_feed_forward(x_BTD, Forecast(self.feed_forward(ff_in_BTD)))

    def cached(
        self,
        x_BTD: Tensor,
        c_BD: Tensor,
        rotary: RotaryTable | None,
        cache: LayerCache,
        tokens: TokenIndex | None,
    ) -> tuple[Tensor, TokenIndex | None]:
        """Return [B, T, D] with ``cache``, and the tokens whose rows of attention the last MoE block refreshed.

        ``tokens``: those of the blocks before this one.
        """
        modulation, feed_forward = self.modulation(c_BD), self.feed_forward
        attn_out = attention_output(self.attn, x_BTD, modulation, rotary, cache)
        if isinstance(cache.policy, ModulePolicy):
            x_BTD = modulation.after_attention(x_BTD, attn_out)
            ff_out = module_feed_forward(feed_forward, x_BTD, modulation, cache)
            return modulation.after_feed_forward(x_BTD, ff_out), None
        if isinstance(feed_forward, MoELayer):
            return branch_feed_forward(feed_forward, self.attn, x_BTD, attn_out, modulation, rotary, cache)
        x_BTD = dense_feed_forward(feed_forward, self.attn, x_BTD, attn_out, modulation, rotary, cache, tokens)
        return x_BTD, tokens


def moe_layer(spec: ModelSpec, router: Router) -> MoELayer:
    """Return a MoE layer of the published kind: SwiGLU experts with stacked weights, and a shared one."""
    experts = RoutedExperts(spec.hidden_size, spec.expert_width, spec.num_experts)
    shared = SwiGLU(spec.hidden_size, spec.shared_width) if spec.shared_width else None
    return MoELayer(router, experts, shared, spec.num_experts)


class FinalLayer(nn.Module):
    """The last layer [B, T, D] -> [B, T, patch * patch * C_out], with channels fastest."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        return self.linear(modulate(normalise(x_BTD), shift, scale))


def unpatchify(patches_BTP: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Return [B, C, rows * p, columns * p] of patches [B, rows * columns, p * p * C].

    Each patch vector is (p, q, c).
    """
    batch, _, width = patches_BTP.shape
    # The channel count is computed, not left to -1: a rank without images reshapes zero elements.
    channels = width // patch_size**2
    grid = patches_BTP.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)

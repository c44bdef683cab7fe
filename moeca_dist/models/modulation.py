"""adaLN: how the condition shifts, scales and gates what a block computes (DiT, Peebles and Xie 2023, section 3.2).

Shape suffixes: B images (or single tokens, as images of one), T tokens of one image, D hidden size, N rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.reference import NORM_EPS
from moeca_dist.kernels.select import kernels_for
from moeca_dist.kernels.types import Entering, Forecast

Index = slice | Tensor


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def normalise(x_BTD: Tensor) -> Tensor:
    """LayerNorm without affine parameters."""
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS)


@dataclass(frozen=True)
class Modulation:
    """The six vectors of one block for every image."""

    shift_attention_BD: Tensor
    scale_attention_BD: Tensor
    gate_attention_BD: Tensor
    shift_feed_forward_BD: Tensor
    scale_feed_forward_BD: Tensor
    gate_feed_forward_BD: Tensor

    def at(self, images: Index) -> "Modulation":
        """Those of some images; with an index per row, [N, 1, D] rows are modulated each by its own image."""
        return Modulation(
            self.shift_attention_BD[images],
            self.scale_attention_BD[images],
            self.gate_attention_BD[images],
            self.shift_feed_forward_BD[images],
            self.scale_feed_forward_BD[images],
            self.gate_feed_forward_BD[images],
        )

    def enter_feed_forward(self, x_BTD: Tensor, attended_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """``after_attention``, and ``to_feed_forward`` of it."""
        if torch.is_grad_enabled():
            after_BTD = self.after_attention(x_BTD, attended_BTD)
            return after_BTD, self.to_feed_forward(after_BTD)
        after_BTD, entering_BTD = empty_stream(x_BTD), empty_stream(x_BTD)
        self.forecast_into_feed_forward(x_BTD, Forecast(attended_BTD), after_BTD, entering_BTD)
        return after_BTD, entering_BTD

    def forecast_into_feed_forward(
        self, x_BTD: Tensor, attended: Forecast, after_BTD: Tensor, entering_BTD: Tensor
    ) -> None:
        """The same of an attention output that is extrapolated on the way."""
        entering = Entering(entering_BTD, self.shift_feed_forward_BD, self.scale_feed_forward_BD)
        kernels_for(x_BTD.device).residual_modulated(x_BTD, self.gate_attention_BD, attended, after_BTD, entering)

    def to_attention(self, x_BTD: Tensor) -> Tensor:
        return modulate(normalise(x_BTD), self.shift_attention_BD, self.scale_attention_BD)

    def after_attention(self, x_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        return residual(x_BTD, self.gate_attention_BD, attended_BTD)

    def to_feed_forward(self, x_BTD: Tensor) -> Tensor:
        return modulate(normalise(x_BTD), self.shift_feed_forward_BD, self.scale_feed_forward_BD)

    def after_feed_forward(self, x_BTD: Tensor, fed_BTD: Tensor) -> Tensor:
        return residual(x_BTD, self.gate_feed_forward_BD, fed_BTD)


def residual(x_BTD: Tensor, gate_BD: Tensor, branch_BTD: Tensor) -> Tensor:
    """[B, T, D]: ``x`` plus gate x branch."""
    if torch.is_grad_enabled():  # training: kernels write into given memory, where no gradient can follow
        return x_BTD + gate_BD[:, None] * branch_BTD
    after_BTD = empty_stream(x_BTD)
    kernels_for(x_BTD.device).gated_residual(x_BTD, gate_BD, Forecast(branch_BTD), after_BTD)
    return after_BTD


def empty_stream(like_BTD: Tensor) -> Tensor:
    """Room for a residual stream; contiguous, which the output of the patch embedding is not."""
    return torch.empty_like(like_BTD, memory_format=torch.contiguous_format)

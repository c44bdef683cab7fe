"""adaLN: how the condition shifts, scales and gates what a block computes (DiT, Peebles and Xie 2023, section 3.2).

Shape suffixes: B images (or single tokens, as images of one), T tokens of one image, D hidden size, N rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.reference import NORM_EPS
from moeca_dist.kernels.types import Entering, Forecast, Kernels

Index = slice | Tensor


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Return ``x * (1 + scale) + shift``, with one shift and scale for each image."""
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def normalise(x_BTD: Tensor) -> Tensor:
    """Apply LayerNorm without affine parameters."""
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS)


@dataclass(frozen=True)
class Modulation:
    """The six vectors of one block for every image, and the kernels that apply them."""

    kernels: Kernels
    shift_attention_BD: Tensor
    scale_attention_BD: Tensor
    gate_attention_BD: Tensor
    shift_feed_forward_BD: Tensor
    scale_feed_forward_BD: Tensor
    gate_feed_forward_BD: Tensor

    def at(self, images: Index) -> "Modulation":
        """Return those of some images. With an index per row, [N, 1, D] rows are modulated each by its own image."""
        return Modulation(
            self.kernels,
            self.shift_attention_BD[images],
            self.scale_attention_BD[images],
            self.gate_attention_BD[images],
            self.shift_feed_forward_BD[images],
            self.scale_feed_forward_BD[images],
            self.gate_feed_forward_BD[images],
        )

    def to_attention(self, x_BTD: Tensor) -> Tensor:
        """Return the input of attention: the normed and modulated stream."""
        return modulate(normalise(x_BTD), self.shift_attention_BD, self.scale_attention_BD)

    def after_attention(self, x_BTD: Tensor, attn_out: Forecast) -> Tensor:
        """Return the stream with the gated attention output added."""
        return self._residual(x_BTD, self.gate_attention_BD, attn_out)

    def to_feed_forward(self, x_BTD: Tensor) -> Tensor:
        """Return the input of the feed-forward: the normed and modulated stream."""
        return modulate(normalise(x_BTD), self.shift_feed_forward_BD, self.scale_feed_forward_BD)

    def after_feed_forward(self, x_BTD: Tensor, ff_out: Forecast) -> Tensor:
        """Return the stream with the gated feed-forward output added."""
        return self._residual(x_BTD, self.gate_feed_forward_BD, ff_out)

    def enter_feed_forward(self, x_BTD: Tensor, attn_out: Forecast) -> tuple[Tensor, Tensor]:
        """Return ``after_attention`` and ``to_feed_forward`` of it, in one kernel. Both are new tensors."""
        if torch.is_grad_enabled():
            after_BTD = self.after_attention(x_BTD, attn_out)
            return after_BTD, self.to_feed_forward(after_BTD)
        after_BTD, ff_in_BTD = empty_stream(x_BTD), empty_stream(x_BTD)
        entering = Entering(ff_in_BTD, self.shift_feed_forward_BD, self.scale_feed_forward_BD)
        self.kernels.residual_modulated(x_BTD, self.gate_attention_BD, attn_out, after_BTD, entering)
        return after_BTD, ff_in_BTD

    def _residual(self, x_BTD: Tensor, gate_BD: Tensor, branch: Forecast) -> Tensor:
        """Return [B, T, D]: ``x`` plus gate x branch."""
        if torch.is_grad_enabled():  # training: kernels write into given memory, where no gradient can follow
            return x_BTD + gate_BD[:, None] * branch.sum()
        after_BTD = empty_stream(x_BTD)
        self.kernels.gated_residual(x_BTD, gate_BD, branch, after_BTD)
        return after_BTD


def empty_stream(like_BTD: Tensor) -> Tensor:
    """Return uninitialised memory for a residual stream. It is contiguous, unlike the output of the patch embedding."""
    return torch.empty_like(like_BTD, memory_format=torch.contiguous_format)

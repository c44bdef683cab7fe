"""adaLN: how the condition shifts, scales and gates what a block computes (DiT, Peebles and Xie 2023, section 3.2).

Shape suffixes: B images (or single tokens, as images of one), T tokens of one image, D hidden size, N rows.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-6
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

    def to_attention(self, x_BTD: Tensor) -> Tensor:
        return modulate(normalise(x_BTD), self.shift_attention_BD, self.scale_attention_BD)

    def after_attention(self, x_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        return x_BTD + self.gate_attention_BD[:, None] * attended_BTD

    def to_feed_forward(self, x_BTD: Tensor) -> Tensor:
        return modulate(normalise(x_BTD), self.shift_feed_forward_BD, self.scale_feed_forward_BD)

    def after_feed_forward(self, x_BTD: Tensor, fed_BTD: Tensor) -> Tensor:
        return x_BTD + self.gate_feed_forward_BD[:, None] * fed_BTD

"""Self-attention in the layouts of the published checkpoints, and 2-D rotary embeddings.

Shape suffixes: B images, T tokens of one image, D hidden size, N heads, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines [T, H] of every token position in fp32, the same for all heads."""

    cos_TH: Tensor
    sin_TH: Tensor

    def at(self, position_N: Tensor) -> "RotaryTable":
        """Return the table of the tokens ``position_N``, one row for each."""
        return RotaryTable(self.cos_TH.index_select(0, position_N), self.sin_TH.index_select(0, position_N))


def rotary_table(rows: int, columns: int, head_dim: int, device: torch.device) -> RotaryTable:
    """Return the table of 2-D RoPE: the first half of each head rotates with the row, the second with the column.

    Each half holds the H/4 angles theta_i = base^(-i / (H/4)) twice, as [f, f].
    """
    quarter = head_dim // 4
    frequencies = ROTARY_BASE ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    row_T = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns)
    column_T = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows)
    row_angles = row_T[:, None] * frequencies
    column_angles = column_T[:, None] * frequencies
    angles_TH = torch.cat([row_angles, row_angles, column_angles, column_angles], dim=-1)
    return RotaryTable(angles_TH.cos(), angles_TH.sin())


def rotate(x_BNTH: Tensor, table: RotaryTable) -> Tensor:
    """Apply 2-D RoPE to queries or keys in fp32 and return the input's dtype."""
    # The tables are fp32 and would promote q and k past v's dtype, which attention refuses.
    x = x_BNTH.float()
    first, second, third, fourth = x.chunk(4, dim=-1)
    rotated = torch.cat([-second, first, -fourth, third], dim=-1)
    return (x * table.cos_TH + rotated * table.sin_TH).to(x_BNTH.dtype)


class Attention(nn.Module):
    """Attention in three parts, so that single rows can be computed: project, mix, output."""

    num_heads: int

    def project(self, x_BTD: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, N, T, H] as attention takes them: normed and rotated."""
        raise NotImplementedError

    def output(self, mixed_BTD: Tensor) -> Tensor:
        """Apply the output projection."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, rotary: RotaryTable | None) -> Tensor:
        return self.attend(*self.project(x_BTD, rotary))

    def attend(self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
        """Return [B, T, D] from the results of ``project``."""
        return self.output(merge_heads(mix(q_BNTH, k_BNTH, v_BNTH)))


class SelfAttention(Attention):
    """Attention with fused ``qkv`` and ``proj``, both with biases (DSMoE, and DiT-MoE S and B)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x_BTD: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BNTH, k_BNTH, v_BNTH = split_heads(self.qkv(x_BTD), self.num_heads)
        if rotary is not None:
            q_BNTH, k_BNTH = rotate(q_BNTH, rotary), rotate(k_BNTH, rotary)
        return q_BNTH, k_BNTH, v_BNTH

    def output(self, mixed_BTD: Tensor) -> Tensor:
        return self.proj(mixed_BTD)


class NormedSelfAttention(Attention):
    """Attention with ``Wqkv`` and ``out_proj``, and affine LayerNorms on q and k (DiT-MoE XL and G)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = nn.LayerNorm(head_dim)
        self.k_norm = nn.LayerNorm(head_dim)

    def project(self, x_BTD: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BNTH, k_BNTH, v_BNTH = split_heads(self.Wqkv(x_BTD), self.num_heads)
        # The published networks round q and k to fp16; in fp32 the rounding is part of the function.
        q_BNTH = self.q_norm(q_BNTH).to(torch.float16).to(v_BNTH.dtype)
        k_BNTH = self.k_norm(k_BNTH).to(torch.float16).to(v_BNTH.dtype)
        if rotary is not None:
            q_BNTH, k_BNTH = rotate(q_BNTH, rotary), rotate(k_BNTH, rotary)
        return q_BNTH, k_BNTH, v_BNTH

    def output(self, mixed_BTD: Tensor) -> Tensor:
        return self.out_proj(mixed_BTD)


def mix(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """Compute softmax attention. There may be fewer queries than keys."""
    return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH)


def split_heads(qkv_BTX: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, T, 3 * D], laid out as (3, heads, head size), into three of [B, N, T, H]."""
    batch, tokens, width = qkv_BTX.shape
    qkv = qkv_BTX.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def merge_heads(x_BNTH: Tensor) -> Tensor:
    """Merge [B, N, T, H] into [B, T, D]."""
    return x_BNTH.transpose(1, 2).flatten(2)

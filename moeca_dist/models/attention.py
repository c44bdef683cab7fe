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
    """fp32 cosines and sines [T, H] of every token position, for all heads alike."""

    cos_TH: Tensor
    sin_TH: Tensor


def rotary_table(rows: int, columns: int, head_dim: int, device: torch.device) -> RotaryTable:
    """2-D RoPE: the first half of each head rotates with the row, the second with the column.

    Within a half the H/4 angles theta_i = base^(-i / (H/4)) stand twice, [f, f].
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


class SelfAttention(nn.Module):
    """Fused ``qkv`` and ``proj`` with biases (DSMoE; DiT-MoE S and B)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor, rotary: RotaryTable | None) -> Tensor:
        q_BNTH, k_BNTH, v_BNTH = split_heads(self.qkv(x_BTD), self.num_heads)
        if rotary is not None:
            q_BNTH, k_BNTH = rotate(q_BNTH, rotary), rotate(k_BNTH, rotary)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH)))


class NormedSelfAttention(nn.Module):
    """``Wqkv`` and ``out_proj``, with affine LayerNorms on q and k (DiT-MoE XL and G)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = nn.LayerNorm(head_dim)
        self.k_norm = nn.LayerNorm(head_dim)

    def forward(self, x_BTD: Tensor, rotary: RotaryTable | None) -> Tensor:
        q_BNTH, k_BNTH, v_BNTH = split_heads(self.Wqkv(x_BTD), self.num_heads)
        # The published networks round q and k to fp16; in fp32 the rounding is part of the function.
        q_BNTH = self.q_norm(q_BNTH).to(torch.float16).to(v_BNTH.dtype)
        k_BNTH = self.k_norm(k_BNTH).to(torch.float16).to(v_BNTH.dtype)
        if rotary is not None:
            q_BNTH, k_BNTH = rotate(q_BNTH, rotary), rotate(k_BNTH, rotary)
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH)))


def split_heads(qkv_BTX: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3 * D], laid out as (3, heads, head size), -> three of [B, N, T, H]."""
    batch, tokens, width = qkv_BTX.shape
    qkv = qkv_BTX.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def merge_heads(x_BNTH: Tensor) -> Tensor:
    """[B, N, T, H] -> [B, T, D]."""
    return x_BNTH.transpose(1, 2).flatten(2)

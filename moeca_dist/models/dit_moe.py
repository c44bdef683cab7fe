"""DiT-MoE: MoE in every block, softmax router, fixed sin-cos positions, and two attention layouts."""

from collections.abc import Iterable
from types import MappingProxyType

import torch
from torch import Tensor

from moeca_dist.models.attention import NormedSelfAttention, SelfAttention
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.blocks import AdaLNBlock, moe_layer
from moeca_dist.models.spec import ModelSpec, TimeConvention
from moeca_dist.moe.router import SoftmaxRouter

EXPERT_RATIO = 4
SHARED_RATIO = 2


class DiTMoE(DiffusionTransformer):
    """A transformer of the DiT-MoE family."""

    pos_embed: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, [_block(spec) for _ in range(spec.depth)])
        rows = spec.input_size // spec.patch_size
        self.register_buffer("pos_embed", sincos_positions(rows, rows, spec.hidden_size)[None])

    def add_positions(self, x_BTD: Tensor, rows: int, columns: int) -> tuple[Tensor, None]:
        if rows * columns != self.pos_embed.shape[1]:
            raise ValueError(
                f"this network was trained on {self.spec.input_size} x {self.spec.input_size} inputs; its position "
                f"table of {self.pos_embed.shape[1]} tokens does not fit {rows} x {columns}"
            )
        return x_BTD + self.pos_embed, None


def sincos_positions(rows: int, columns: int, hidden_size: int) -> Tensor:
    """Return the fixed 2-D sin-cos table [rows * columns, D] in fp32.

    The first half of each row encodes the column, the second half the row of the image.
    """
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row_T = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_T = torch.arange(columns, dtype=torch.float64).repeat(rows)
    halves = [torch.cat([angle.sin(), angle.cos()], dim=-1) for angle in _outer(frequencies, column_T, row_T)]
    return torch.cat(halves, dim=-1).float()


def _outer(frequencies: Tensor, *positions: Tensor) -> list[Tensor]:
    return [position[:, None] * frequencies for position in positions]


def _block(spec: ModelSpec) -> AdaLNBlock:
    attention = (NormedSelfAttention if spec.qk_norm else SelfAttention)(spec.hidden_size, spec.num_heads)
    router = SoftmaxRouter(spec.hidden_size, spec.num_experts, spec.num_experts_per_tok)
    layer = moe_layer(spec, router)
    return AdaLNBlock(spec.hidden_size, attention, layer, "moe")


def _published(depth: int, hidden_size: int, num_heads: int, num_experts: int, qk_norm: bool) -> ModelSpec:
    return ModelSpec(
        family="dit_moe",
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_experts=num_experts,
        num_experts_per_tok=2,
        expert_width=EXPERT_RATIO * hidden_size,
        shared_width=SHARED_RATIO * hidden_size,
        moe_blocks=tuple(range(depth)),
        input_size=32,
        in_channels=4,
        out_channels=8,
        num_classes=1000,
        time_convention=TimeConvention.FLOW_DATA_TO_NOISE if qk_norm else TimeConvention.DDPM_EPSILON,
        qk_norm=qk_norm,
    )


# No published file fixes the attention of L; its released training code is that of S and B.
PUBLISHED = MappingProxyType(
    {
        "DiT-MoE-S-8E2A": _published(12, 384, 6, 8, qk_norm=False),
        "DiT-MoE-S-16E2A": _published(12, 384, 6, 16, qk_norm=False),
        "DiT-MoE-B-8E2A": _published(12, 768, 12, 8, qk_norm=False),
        "DiT-MoE-L-8E2A": _published(24, 1024, 16, 8, qk_norm=False),
        "DiT-MoE-XL-8E2A": _published(28, 1152, 16, 8, qk_norm=True),
        "DiT-MoE-G-16E2A": _published(40, 1408, 16, 16, qk_norm=True),
    }
)


def matches(keys: Iterable[str]) -> bool:
    """Return whether a checkpoint with these keys is of this family."""
    return any(key.startswith("blocks.") and ".moe.experts." in key for key in keys)


def experts_prefix(block: int) -> str:
    """Return the prefix of a block's stacked expert weights in this package's networks."""
    return f"blocks.{block}.moe.experts"


def expert_key(block: int, expert: int, projection: str) -> str:
    """Return the published key of one expert's ``gate``, ``up`` or ``down`` projection."""
    return f"blocks.{block}.moe.experts.{expert}.{projection}_proj.weight"

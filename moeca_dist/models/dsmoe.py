"""DSMoE (EfficientMoE): MoE in odd blocks, dense MLPs in even ones, sigmoid router, 2-D rotary embeddings."""

from collections.abc import Iterable
from types import MappingProxyType

from torch import Tensor

from moeca_dist.models.attention import RotaryTable, SelfAttention, rotary_table
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.blocks import AdaLNBlock, DenseMLP, moe_layer
from moeca_dist.models.spec import ModelSpec, TimeConvention
from moeca_dist.moe.router import SigmoidRouter

DENSE_RATIO = 4


class DSMoE(DiffusionTransformer):
    """A transformer of the DSMoE family."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, [_block(spec, index) for index in range(spec.depth)])

    def add_positions(self, x_BTD: Tensor, rows: int, columns: int) -> tuple[Tensor, RotaryTable]:
        return x_BTD, rotary_table(rows, columns, self.spec.head_dim, x_BTD.device)


def _block(spec: ModelSpec, index: int) -> AdaLNBlock:
    attention = SelfAttention(spec.hidden_size, spec.num_heads)
    if index not in spec.moe_blocks:
        return AdaLNBlock(spec.hidden_size, attention, DenseMLP(spec.hidden_size, spec.dense_width), "mlp")
    router = SigmoidRouter(
        spec.hidden_size,
        spec.num_experts,
        spec.num_experts_per_tok,
        spec.n_group,
        spec.topk_group,
        spec.routed_scaling_factor,
    )
    layer = moe_layer(spec, router)
    return AdaLNBlock(spec.hidden_size, attention, layer, "mlp")


def odd_blocks(depth: int) -> tuple[int, ...]:
    """Return the indices of the odd blocks, which hold the MoE layers of published networks."""
    return tuple(range(1, depth, 2))


def _published(depth: int, hidden_size: int, num_heads: int, experts: tuple[int, int, int]) -> ModelSpec:
    num_experts, num_experts_per_tok, width = experts
    coarse = num_experts == 16
    return ModelSpec(
        family="dsmoe",
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        expert_width=width,
        shared_width=width,
        moe_blocks=odd_blocks(depth),
        input_size=32,
        in_channels=4,
        out_channels=8,
        num_classes=1000,
        time_convention=TimeConvention.FLOW_NOISE_TO_DATA,
        n_group=2 if coarse else 1,
        topk_group=2 if coarse else 1,
        routed_scaling_factor=2.0 if coarse else 2.5,
        dense_width=DENSE_RATIO * hidden_size,
    )


PUBLISHED = MappingProxyType(
    {
        "DSMoE-S-E16": _published(10, 384, 6, (16, 2, 768)),
        "DSMoE-S-E48": _published(12, 384, 6, (48, 5, 128)),
        "DSMoE-B-E16": _published(10, 768, 12, (16, 2, 1536)),
        "DSMoE-B-E48": _published(12, 768, 12, (48, 5, 256)),
        "DSMoE-L-E16": _published(20, 1024, 16, (16, 2, 2048)),
        "DSMoE-L-E48": _published(24, 1024, 16, (48, 5, 448)),
        "DSMoE-3B-E16": _published(30, 1152, 16, (16, 2, 2880)),
    }
)


def matches(keys: Iterable[str]) -> bool:
    """Return whether a checkpoint with these keys is of this family."""
    return any(key.startswith("blocks.") and ".mlp.experts.blocks." in key for key in keys)


def experts_prefix(block: int) -> str:
    """Return the prefix of a block's stacked expert weights in this package's networks."""
    return f"blocks.{block}.mlp.experts"


def expert_key(block: int, expert: int, projection: str) -> str:
    """Return the published key of one expert's ``gate``, ``up`` or ``down`` projection."""
    return f"blocks.{block}.mlp.experts.blocks.{expert}.{projection}_proj.weight"

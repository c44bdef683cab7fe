"""What ``layer.py`` measures: layer shapes, token counts, routings, and the tensors they stand for.

Shape suffixes: T tokens of one rank, D hidden size, I expert width, E experts, L experts held here, K routed experts
per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.moe.experts import RoutedExperts

TOKENS_PER_IMAGE = 256
SPARSE_SHARE = 0.05  # what a cached step is expected to send
HOT_EXPERTS = 2


@dataclass(frozen=True)
class Shape:
    """One MoE layer, named after the published model that has it."""

    name: str
    hidden_size: int
    expert_width: int
    num_experts: int
    num_experts_per_tok: int


@dataclass(frozen=True)
class Case:
    """One measurement: a layer, how many tokens each rank brings, and how they are routed."""

    shape: Shape
    num_tokens: int
    presence: str  # "full" or "sparse"
    routing: str  # "balanced" or "skewed"


PUBLISHED = (
    Shape("DSMoE-S-E16", 384, 768, 16, 2),
    Shape("DSMoE-S-E48", 384, 128, 48, 5),
    Shape("DSMoE-L-E16", 1024, 2048, 16, 2),
    Shape("DSMoE-L-E48", 1024, 448, 48, 5),
)
TINY = (Shape("tiny-E8", 32, 16, 8, 2), Shape("tiny-E12", 32, 16, 12, 5))


def make_cases(shapes: Sequence[Shape], images_per_rank: int, tokens_per_image: int) -> list[Case]:
    full = images_per_rank * tokens_per_image
    present = {"full": full, "sparse": max(1, round(full * SPARSE_SHARE))}
    return [
        Case(shape, num_tokens, presence, routing)
        for shape in shapes
        for presence, num_tokens in present.items()
        for routing in ("balanced", "skewed")
    ]


def make_experts(shape: Shape, held: Sequence[int], dtype: torch.dtype, device: torch.device) -> RoutedExperts:
    """The experts with global ids ``held``: each is drawn from its own seed, so every placement has the same ones."""
    hidden, width = shape.hidden_size, shape.expert_width
    with torch.device("meta"):
        experts = RoutedExperts(hidden, width, len(held))
    experts.to_empty(device=device).to(dtype).requires_grad_(False)
    for position, expert in enumerate(held):
        draw = torch.Generator().manual_seed(expert)
        for weight in (experts.w1, experts.w3, experts.w2):
            out_features, in_features = weight.shape[1:]
            weight[position].copy_(torch.randn(out_features, in_features, generator=draw) / in_features**0.5)
    return experts


def make_input(case: Case, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of one rank [T, D], their experts and gates [T, K]. Gates sum to 1, which every contender can express."""
    draw = torch.Generator().manual_seed(1000 + rank)
    shape, num_tokens = case.shape, case.num_tokens
    x_TD = torch.randn(num_tokens, shape.hidden_size, generator=draw)
    expert_ids_TK = draw_experts(case, draw)
    gates_TK = torch.rand(num_tokens, shape.num_experts_per_tok, generator=draw).add_(0.1)
    gates_TK /= gates_TK.sum(-1, keepdim=True)
    return x_TD.to(device, dtype), expert_ids_TK.to(device), gates_TK.to(device)


def draw_experts(case: Case, draw: torch.Generator) -> Tensor:
    """Distinct experts per token [T, K], uniform; skewed: as near as possible to half of all branches on two experts.

    A token can have each expert only once, so with K = 5 at most two of its branches, 40%, fall on the hot pair. The
    pair lies on the first rank: with two ranks that one computes about 70% of all rows.
    """
    shape = case.shape
    preference_TE = torch.rand(case.num_tokens, shape.num_experts, generator=draw)
    if case.routing == "balanced":
        return preference_TE.topk(shape.num_experts_per_tok).indices
    num_hot = min(HOT_EXPERTS, (shape.num_experts_per_tok + 1) // 2)
    hot_TK = preference_TE[:, :HOT_EXPERTS].topk(num_hot).indices
    cold_TK = preference_TE[:, HOT_EXPERTS:].topk(shape.num_experts_per_tok - num_hot).indices + HOT_EXPERTS
    return torch.cat((hot_TK, cold_TK), dim=1)

"""The layers that ``layer.py`` compares: same expert weights (shared storage), same routing, router given.

A contender is a callable [T, D] -> [T, D] that every rank of the group calls together: dispatch, experts, combine.

Shape suffixes: T tokens of this rank, D hidden size, E experts, K routed experts per token, N branches of this rank
(= T * K), R rows computed here, P ranks of the group, G tokens of all ranks (= P * T).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate, top2gating, topkgating
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layer.layer_cases import Case
from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.dispatcher import LocalDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.types import Routing

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setup:
    """What every contender is given."""

    case: Case
    mesh: Mesh
    placement: ExpertPlacement
    experts: RoutedExperts
    expert_ids_TK: Tensor
    gates_TK: Tensor


def ours(setup: Setup) -> Layer:
    """The dispatcher and experts of ``moeca_dist.moe.layer.MoELayer``, called as it calls them without a cache."""
    group = setup.mesh.expert_group
    local = LocalDispatcher(setup.case.shape.num_experts)
    dispatcher = local if group is None else AllToAllDispatcher(group, setup.placement)

    def run(x_TD: Tensor) -> Tensor:
        routing = Routing.top_k(setup.expert_ids_TK, setup.gates_TK)
        dispatched = dispatcher.dispatch(x_TD, routing.branches, routing.gate_N).wait()
        outputs_RD = setup.experts(dispatched.rows_RD, dispatched.rows_per_expert_L)
        return dispatcher.combine_sums(outputs_RD, dispatched, routing).wait()

    return run


class GivenLogitsGate(TopKGate):
    """DeepSpeed's gate without the router's matrix product: it turns given logits into slots and capacity.

    ``drop_tokens=False``: the capacity of each call is the largest row count of any expert on any rank, agreed by
    all-reduce: the smallest that loses no token.
    """

    def __init__(self, setup: Setup) -> None:
        shape, gates_TK = setup.case.shape, setup.gates_TK
        super().__init__(shape.hidden_size, shape.num_experts, shape.num_experts_per_tok)
        # A softmax over these returns the given gates: experts not chosen have probability zero.
        logits_TE = torch.full((gates_TK.shape[0], shape.num_experts), float("-inf"), device=gates_TK.device)
        self.logits_TE = logits_TE.scatter_(1, setup.expert_ids_TK, gates_TK.log())

    def forward(self, x: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool) -> tuple:
        common = {"capacity_factor": 1.0, "min_capacity": 0, "drop_tokens": False, "ep_group": self.ep_group}
        if self.k == 2:
            return top2gating(self.logits_TE, **common, top2_2nd_expert_sampling=False, sparse_routes=sparse_routes)
        return topkgating(self.logits_TE, self.k, **common, sparse_routes=sparse_routes)


def classic_layer(setup: Setup) -> MoE:
    shape, experts = setup.case.shape, setup.experts
    with torch.device("meta"):
        layer = MoE(
            shape.hidden_size,
            SwiGLU(shape.hidden_size, shape.expert_width),
            num_experts=shape.num_experts,
            ep_size=setup.mesh.ep_size,
            k=shape.num_experts_per_tok,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).eval()
    for position, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        projections = {"gate_proj": experts.w1, "up_proj": experts.w3, "down_proj": experts.w2}
        for name, stacked in projections.items():
            getattr(expert, name).weight = nn.Parameter(stacked[position], requires_grad=False)
    layer.deepspeed_moe.gate = GivenLogitsGate(setup)
    if setup.mesh.ep_size > 1:
        layer.set_deepspeed_parallelism()
    return layer


def classic(setup: Setup) -> Layer:
    """``deepspeed.moe.layer.MoE`` (GShard): every expert padded to one capacity, even all-to-all, loop over experts."""
    layer = classic_layer(setup)
    return lambda x_TD: layer(x_TD)[0]


def classic_gate(setup: Setup) -> Layer:
    """The part of ``classic`` that turns logits into slots, alone: it holds a softmax that is not charged to others."""
    moe = classic_layer(setup).deepspeed_moe
    return lambda x_TD: moe.gate(x_TD, None, True, False)[5]


class GivenRoutes(nn.Module):
    """Stands in for AutoEP's router: the counts, which it needs for its dispatch, are still its work."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.expert_ids_TK, self.gates_TK = setup.expert_ids_TK, setup.gates_TK
        self.num_experts = setup.case.shape.num_experts

    def forward(self, x_TD: Tensor, expert_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        counts_E = count_tokens_per_expert(self.expert_ids_TK, self.num_experts)
        return self.gates_TK, self.expert_ids_TK, counts_E


def auto_ep(setup: Setup) -> Layer:
    """``AutoEPMoELayer`` with its default configuration: variable splits, rows padded to 8 per expert, grouped GEMM."""
    shape, mesh = setup.case.shape, setup.mesh
    with torch.device("meta"):
        replaced = _HuggingFaceLike(setup)
        layer = AutoEPMoELayer(_auto_ep_spec(setup), replaced, mesh.ep_size, mesh.ep_rank, AutoEPConfig())
    layer.router = GivenRoutes(setup)
    layer.experts.w1, layer.experts.w2, layer.experts.w3 = setup.experts.w1, setup.experts.w2, setup.experts.w3
    layer.tokens_per_expert = torch.zeros(shape.num_experts, device=mesh.device)
    if mesh.ep_size > 1:
        layer.set_deepspeed_parallelism()
    return lambda x_TD: layer(x_TD[None])[0]


class _HuggingFaceLike(nn.Module):
    """The block AutoEP expects to replace: a gate and stacked experts, here without storage."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        shape = setup.case.shape
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.experts = RoutedExperts(shape.hidden_size, shape.expert_width, shape.num_experts)


def _auto_ep_spec(setup: Setup) -> MoELayerSpec:
    shape = setup.case.shape
    return MoELayerSpec(
        moe_module_name="mlp",
        model_family="custom",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="w1",
        expert_w2_name="w2",
        expert_w3_name="w3",
        num_experts=shape.num_experts,
        top_k=shape.num_experts_per_tok,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.expert_width,
        score_func="softmax",
        score_apply="post",
        route_norm=False,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )


def naive(setup: Setup) -> Layer:
    """Every rank sees all tokens, loops over its own experts and adds up; the sums are reduced over the ranks."""
    mesh, experts = setup.mesh, setup.experts
    held = setup.placement.experts_of(mesh.ep_rank)

    def run(x_TD: Tensor) -> Tensor:
        x_GD, ids_GK, gates_GK = (_all_gather(tensor, mesh) for tensor in (x_TD, setup.expert_ids_TK, setup.gates_TK))
        y_GD = torch.zeros_like(x_GD)
        for position, expert in enumerate(held):
            tokens, slots = (ids_GK == expert).nonzero(as_tuple=True)
            rows = x_GD.index_select(0, tokens)
            hidden = F.silu(rows @ experts.w1[position].t()) * (rows @ experts.w3[position].t())
            gates = gates_GK[tokens, slots].to(rows.dtype)[:, None]
            y_GD.index_add_(0, tokens, (hidden @ experts.w2[position].t()) * gates)
        if mesh.expert_group is None:
            return y_GD
        y_TD = torch.empty_like(x_TD)
        dist.reduce_scatter_tensor(y_TD, y_GD, group=mesh.expert_group.group)
        return y_TD

    return run


def _all_gather(tensor: Tensor, mesh: Mesh) -> Tensor:
    if mesh.expert_group is None:
        return tensor
    gathered = tensor.new_empty(mesh.ep_size * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor, group=mesh.expert_group.group)
    return gathered


CONTENDERS: Mapping[str, Callable[[Setup], Layer]] = {
    "ours": ours,
    "classic": classic,
    "autoep": auto_ep,
    "naive": naive,
}

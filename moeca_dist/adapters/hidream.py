"""HiDream-I1 (diffusers' ``HiDreamImageTransformer2DModel``): a softmax router, SwiGLU experts, one shared expert.

MoE layers act on the image's tokens in double-stream blocks, and on those of image and text together in single-stream
blocks.

Shape suffixes: T tokens, D hidden size, K routed experts per token, R rows grouped by expert, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeca_dist.adapters.adapter import Adapter, MoEParts
from moeca_dist.moe.router import Router
from moeca_dist.types import Routing


def adapt_hidream(model: nn.Module) -> Adapter:
    """Put the branch cache under the MoE layers of ``model``, in place; UserError if it has none."""
    # Told by its class's name, so that diffusers is not needed to import this.
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "MOEFeedForwardSwiGLU"}
    return Adapter(model, {name: _parts(layer) for name, layer in layers.items()})


def _parts(layer: Any) -> MoEParts:
    return MoEParts(
        hidden_size=layer.gate.gating_dim,
        num_experts=layer.gate.n_routed_experts,
        router=_Router(layer.gate),
        experts=_Experts(layer.experts),
        shared=layer.shared_experts,
    )


class _Router(Router):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x_TD: Tensor) -> Routing:
        expert_ids_TK, gates_TK, _ = self.gate(x_TD[None])
        return Routing(expert_ids_TK, gates_TK)


class _Experts(nn.Module):
    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, rows_RD: Tensor, rows_per_expert_E: Tensor) -> Tensor:
        # NOTE: a host synchronisation on CUDA, which the model's own layer has as well.
        groups = rows_RD.split(rows_per_expert_E.tolist())
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, groups, strict=True)])

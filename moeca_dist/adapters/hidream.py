"""HiDream-I1 (diffusers' ``HiDreamImageTransformer2DModel``): a softmax router, SwiGLU experts, one shared expert.

In double-stream blocks MoE layers act on the image's tokens. In single-stream blocks they act on the tokens of image
and text together.

Shape suffixes: T tokens, D hidden size, K routed experts per token, R rows grouped by expert, E experts.
"""

from typing import Any

from torch import Tensor, nn

from moeca_dist.adapters.adapter import Adapter, MoEModules
from moeca_dist.moe.experts import ExpertModules
from moeca_dist.moe.router import Router
from moeca_dist.types import Routing


def adapt_hidream(model: nn.Module) -> Adapter:
    """Put the branch cache under the MoE layers of ``model``, in place. Raises UserError if it has none."""
    # Told by its class's name, so that diffusers is not needed to import this.
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "MOEFeedForwardSwiGLU"}
    return Adapter(model, {name: _parts(layer) for name, layer in layers.items()})


def _parts(layer: Any) -> MoEModules:
    return MoEModules(
        num_experts=layer.gate.n_routed_experts,
        router=_Router(layer.gate),
        experts=ExpertModules(list(layer.experts)),
        shared=layer.shared_experts,
    )


class _Router(Router):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x_TD: Tensor) -> Routing:
        expert_ids_TK, gates_TK, _ = self.gate(x_TD[None])
        return Routing.top_k(expert_ids_TK, gates_TK)

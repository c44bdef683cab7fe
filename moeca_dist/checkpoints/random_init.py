"""Random weights for speed measurements, the same for every way of sharding the experts."""

import zlib

import torch
from torch import Tensor

from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.dit_moe import sincos_positions
from moeca_dist.models.registry import FAMILIES
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.moe.router import SigmoidRouter


@torch.no_grad()
def randomise(model: DiffusionTransformer, device: torch.device, dtype: torch.dtype) -> DiffusionTransformer:
    """Materialise a model that was built (and sharded) on the meta device, with weights drawn from their names.

    Matrices are normal with variance 1 / fan-in, so that activations keep their size. Vectors are zero, norms one.
    """
    family = FAMILIES[model.spec.family]
    model.to(dtype)  # while on meta: the wide copy never exists
    for module in model.modules():
        if isinstance(module, SigmoidRouter):
            module.float()
    model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        if ".experts.w" not in name:
            _fill(tensor, name)
    for block, layer in model.moe_layers():
        assert isinstance(layer.experts, RoutedExperts)
        for weights, projection in ((layer.experts.w1, "gate"), (layer.experts.w3, "up"), (layer.experts.w2, "down")):
            for slot, expert in enumerate(layer.local_expert_ids):
                _fill(weights[slot], family.expert_key(block, expert, projection))
    positions = getattr(model, "pos_embed", None)
    if isinstance(positions, Tensor):
        rows = model.spec.input_size // model.spec.patch_size
        positions.copy_(sincos_positions(rows, rows, model.spec.hidden_size)[None])
    return model.eval().requires_grad_(False)


def _fill(tensor: Tensor, name: str) -> None:
    if tensor.ndim < 2:
        tensor.fill_(1.0 if "norm.weight" in name else 0.0)
        return
    generator = torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
    fan_in = tensor[0].numel() if "embedding" not in name else 1
    tensor.normal_(0.0, fan_in**-0.5, generator=generator)

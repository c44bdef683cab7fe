"""The passes that turn a single-device model into a rank's part of an expert-parallel one."""

import copy
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import nn

from moeca_dist.kernels.types import Kernels
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.owner_layer import OwnerMoELayer
from moeca_dist.moe.value_location import Location
from moeca_dist.parallel.dispatcher import Dispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement, PlacementTable
from moeca_dist.parallel.row_packing import RowDtype

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def shard_experts(
    model: DiffusionTransformer,
    table: PlacementTable,
    ep_rank: int,
    make_dispatcher: Callable[[ExpertPlacement], Dispatcher] | None = None,
) -> DiffusionTransformer:
    """Keep only the experts that ``table`` gives to ``ep_rank``, and swap the dispatchers, in place.

    Run it on a model on the meta device, before weights are loaded: experts of other ranks are then never
    materialised. Without ``make_dispatcher`` the layers hold the rank's experts but cannot run (weight inspection).
    """
    # Blocks that are placed alike share a dispatcher, and with it the tables on the device.
    shared = None if make_dispatcher is None else cache(make_dispatcher)
    for block, layer in model.moe_layers():
        placement = table.by_block[block]
        layer.local_expert_ids = placement.experts_of(ep_rank)
        layer.experts.keep_only(layer.local_expert_ids)
        if shared is not None:
            layer.dispatcher = shared(placement)
    return model


def arrange_layers(
    model: DiffusionTransformer, location: Location | None, row_dtype: RowDtype, kernels: Kernels
) -> DiffusionTransformer:
    """Return ``model`` with branch values kept at ``location``, rows that travel as ``row_dtype``, and ``kernels``.

    The model is left alone, and shares all parameters with what is returned: runs that differ can use one network.
    """
    layer_class = OwnerMoELayer if location == "owner" else MoELayer
    layers = dict(model.moe_layers())
    is_arranged = all(
        type(layer) is layer_class and layer.dispatcher.row_dtype == row_dtype for layer in layers.values()
    )
    if is_arranged and model.kernels is kernels:
        return model
    # Layers that share a dispatcher go on sharing one, and with it the tables on the device.
    dispatchers = {layer.dispatcher: layer.dispatcher.arranged(row_dtype, kernels) for layer in layers.values()}
    arranged = _shallow(model)
    arranged.kernels = kernels
    arranged.blocks = nn.ModuleList([_shallow(block) for block in model.adaln_blocks()])
    for block in arranged.adaln_blocks():
        block.kernels = kernels
    for index, layer in layers.items():
        new_layer = layer_class(layer.gate, layer.experts, layer.shared_experts, layer.num_experts)
        new_layer.local_expert_ids = layer.local_expert_ids
        new_layer.dispatcher = dispatchers[layer.dispatcher]
        block = arranged.adaln_blocks()[index]
        setattr(block, block.feed_forward_name, new_layer)
    return arranged


def _shallow(module: AnyModule) -> AnyModule:
    """Return a module with the same parameters and submodules, which can be replaced one by one."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin

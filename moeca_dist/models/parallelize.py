"""The pass that turns a single-device model into a rank's part of an expert-parallel one."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

from torch import nn

from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.parallel.dispatch import Dispatcher
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.placement_table import PlacementTable
from moeca_dist.parallel.wire import RowDtype


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
        _keep_experts(layer.experts, len(layer.local_expert_ids))
        if shared is not None:
            layer.dispatcher = shared(placement)
    return model


def with_rows(model: DiffusionTransformer, row_dtype: RowDtype) -> DiffusionTransformer:
    """Return ``model`` if its rows travel as ``row_dtype``, else another one over the same weights whose rows do."""
    dispatchers = [layer.dispatcher for _, layer in model.moe_layers()]
    wanted = {id(dispatcher): dispatcher.with_rows(row_dtype) for dispatcher in dispatchers}
    if all(wanted[id(dispatcher)] is dispatcher for dispatcher in dispatchers):
        return model
    # What a copy is told to have copied already, it shares.
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared | wanted)


def _keep_experts(experts: RoutedExperts, num_local: int) -> None:
    for name in ("w1", "w2", "w3"):
        whole = getattr(experts, name)
        setattr(experts, name, nn.Parameter(whole.new_empty(num_local, *whole.shape[1:]), requires_grad=False))
    experts.num_experts = num_local

"""The pass that turns a single-device model into a rank's part of an expert-parallel one."""

from collections.abc import Callable

from torch import nn

from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.parallel.dispatch import Dispatcher
from moeca_dist.parallel.placement import ExpertPlacement


def shard_experts(
    model: DiffusionTransformer,
    placement: ExpertPlacement,
    ep_rank: int,
    make_dispatcher: Callable[[], Dispatcher] | None = None,
) -> DiffusionTransformer:
    """Keep only the experts that ``placement`` gives to ``ep_rank``, and swap the dispatcher, in place.

    Run it on a model on the meta device, before weights are loaded: experts of other ranks are then never
    materialised. Without ``make_dispatcher`` the layers hold the rank's experts but cannot run (weight inspection).
    """
    local = placement.experts_of(ep_rank)
    dispatcher = make_dispatcher() if make_dispatcher is not None else None
    for _, layer in model.moe_layers():
        _keep_experts(layer.experts, len(local))
        layer.local_expert_ids = local
        if dispatcher is not None:
            layer.dispatcher = dispatcher
    return model


def _keep_experts(experts: RoutedExperts, num_local: int) -> None:
    for name in ("w1", "w2", "w3"):
        whole = getattr(experts, name)
        setattr(experts, name, nn.Parameter(whole.new_empty(num_local, *whole.shape[1:]), requires_grad=False))
    experts.num_experts = num_local

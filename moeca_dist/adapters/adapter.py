"""The branch cache under the MoE layers of a model that another library built.

A model is adapted by naming its MoE layers. For each layer the cache needs three things: its router, its routed
experts, and the module that it adds besides. ``adapters/hidream.py`` is an example in fifty lines.

Shape suffixes: B images, T tokens of all images (of one image with B), D hidden size, N branches, R rows grouped by
expert, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeca_dist.cache.layer_cache import LayerCache
from moeca_dist.cache.policy import BranchPolicy, ModulePolicy, Policy
from moeca_dist.cache.session import CacheSession, StepCache
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
from moeca_dist.errors import UserError
from moeca_dist.moe.experts import Experts
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.router import Router
from moeca_dist.parallel.dispatcher import DispatchedRows, LocalDispatcher
from moeca_dist.types import Request, Routing


@dataclass(frozen=True)
class MoEModules:
    """One MoE layer of the model: ``output(x) = sum over k of gate_k x expert_k(x) + shared(x)``.

    The three modules hold the model's own parameters, not copies.

    - ``router(x_TD)`` returns a ``Routing`` with distinct experts per token and final gates. Nothing else is asked of
      it.
    - ``experts(rows_RD, rows_per_expert_E)`` returns each row's output [R, D], without its gate. Rows of expert e
      follow those of e - 1. R or any count may be 0.
    - ``shared(x)`` acts on each token by itself.
    """

    num_experts: int
    router: Router
    experts: Experts
    shared: nn.Module


@dataclass
class _Current:
    """What the layers of one adapted model see: the step that ``Adapter.at`` entered, None outside."""

    cache: StepCache | None = None


class _LoopDispatcher(LocalDispatcher):
    """Adds up branches as a loop over experts does, rounding after each product: identical to the usual code."""

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        branch_N = dispatched.slot_of_branch_N.argsort()
        weighted_ND = rows_ND * routing.gate_N[branch_N, None].to(rows_ND.dtype)
        routed_TD = rows_ND.new_zeros(routing.num_tokens, rows_ND.shape[1])
        return routed_TD.index_add_(0, routing.token_N[branch_N], weighted_ND)


class _CachedLayer(nn.Module):
    """Stands in for an MoE layer [B, T, D] -> [B, T, D]; outside of a cached step it is the layer itself."""

    def __init__(self, original: nn.Module, modules: MoEModules, block: int, current: _Current) -> None:
        super().__init__()
        self.original = original
        self._block = block
        self._current = current
        layer = MoELayer(modules.router, modules.experts, modules.shared, modules.num_experts)
        layer.dispatcher = _LoopDispatcher(modules.num_experts)
        # Not a submodule: the model's parameters would appear twice in its state dict.
        self._layer = (layer,)

    def forward(self, x_BTD: Tensor) -> Tensor:
        cache = self._current.cache
        if cache is None:
            return torch.as_tensor(self.original(x_BTD))
        assert isinstance(cache, tuple)
        outputs = [self._part(x_BTD[part.images], part.block(self._block)) for part in cache]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _part(self, x_BTD: Tensor, cache: LayerCache) -> Tensor:
        if isinstance(cache.policy, BranchPolicy):
            layer = self._layer[0]
            return layer.cached(x_BTD, layer.plan(x_BTD, cache), cache)
        if not cache.is_full:
            return cache.forecast("moe").sum()
        output_BTD = torch.as_tensor(self.original(x_BTD))
        cache.keep("moe", output_BTD)
        return output_BTD


@dataclass
class Adapter:
    """A model with the branch cache under it. The model is called as before. Outside of ``at`` it is unchanged.

    Only MoE layers are cached. Attention and everything else are computed in every step. Only one cached run at a time
    is possible.
    """

    model: nn.Module
    parts: Mapping[str, MoEModules]
    _current: _Current = field(default_factory=_Current)

    def __post_init__(self) -> None:
        """Replace the layers that ``parts`` names by their paths, in place. Raises UserError if there are none."""
        if not self.parts:
            raise UserError(f"{type(self.model).__name__} has no MoE layer: nothing to cache")
        for block, (path, modules) in enumerate(self.parts.items()):
            original = self.model.get_submodule(path)
            self._replace(path, _CachedLayer(original, modules, block, self._current))

    def session(self, policy: Policy, requests: Sequence[Request], *, guided: bool) -> CacheSession:
        """Open the caches of one batch of images, with statistics.

        With guidance the model's batch holds the images of ``requests`` twice, conditional ones first.

        Raises UserError for policies that need more of a model than its MoE layers.
        """
        if not _decides_on_layers(policy):
            raise UserError(
                f"{type(policy).__name__} also decides about attention or the whole network, which an adapter does not "
                "cache: choose a policy of branches or modules with attention_sync off, such as moeca_forecast"
            )
        return CacheSession(
            policy,
            requests,
            guided=guided,
            num_blocks=len(self.parts),
            num_experts=max(modules.num_experts for modules in self.parts.values()),
            statistics=CacheStatistics(),
            device=next(self.model.parameters()).device,
        )

    @contextmanager
    def at(self, cache: StepCache) -> Iterator[None]:
        """Make the model's next call inside the context the denoising step of ``cache``.

        ``cache`` comes from ``session.at(StepContext(...))``.
        """
        self._current.cache = cache
        try:
            with torch.no_grad():
                yield
        finally:
            self._current.cache = None

    def remove(self) -> None:
        """Give the model its own layers back."""
        for path in self.parts:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, _CachedLayer)
            self._replace(path, layer.original)

    def _replace(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, layer)


def _decides_on_layers(policy: Policy) -> bool:
    """Return whether ``policy`` needs nothing of a model but its MoE layers."""
    if isinstance(policy, BranchPolicy):
        return not policy.attention_sync
    return isinstance(policy, ModulePolicy) and not policy.refreshes_tokens


def branch_counts(statistics: CacheStatistics) -> dict[str, int]:
    """Return the branches of a run: routed, refreshed (with the unmatched ones), and served from the cache."""
    unmatched, served = statistics.total(Reason.UNMATCHED), statistics.total(Reason.SERVED)
    refreshed = sum(statistics.total(reason) for reason in REFRESHED)
    return {"routed": refreshed + served, "refreshed": refreshed, "unmatched": unmatched, "served": served}

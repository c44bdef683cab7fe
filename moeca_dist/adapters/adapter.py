"""Puts the branch cache under the MoE layers of a model that another library built.

A model is adapted by naming its MoE layers and, for each, the three things that the cache treats apart: how it routes,
its routed experts, and what it adds besides. ``adapters/hidream.py`` is an example in fifty lines.

Shape suffixes: B images, T tokens of all images (of one image with B), D hidden size, K routed experts per token, N
branches, R rows grouped by expert, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeca_dist.cache.policy import Policy
from moeca_dist.cache.session import CacheSession, StepCache
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
from moeca_dist.errors import UserError
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.router import Router
from moeca_dist.parallel.dispatch import DispatchedRows, LocalDispatcher
from moeca_dist.types import Request, Routing


@dataclass(frozen=True)
class MoEParts:
    """One MoE layer of the model: ``output(x) = sum over k of gate_k x expert_k(x) + shared(x)``.

    ``router(x_TD)``, which is all that is asked of it, gives a ``Routing`` with distinct experts per token and final
    gates. ``experts(rows_RD, rows_per_expert_E)`` gives each row's output, without its gate, [R, D]; rows of expert e
    follow those of e - 1, and R or any count may be 0. ``shared(x)`` acts on each token by itself. They hold the
    model's own parameters, not copies.
    """

    hidden_size: int
    num_experts: int
    router: Router
    experts: nn.Module
    shared: nn.Module


@dataclass
class _Current:
    """What the layers of one adapted model see: the step that ``Adapter.at`` entered, None outside."""

    cache: StepCache | None = None


class _LoopDispatcher(LocalDispatcher):
    """Adds up branches as a loop over experts does, rounding after each product: identical to the usual code."""

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        branch_N = dispatched.slot_of_branch_N.argsort()
        weighted_ND = rows_ND * routing.gates_TK.flatten()[branch_N, None].to(rows_ND.dtype)
        routed_TD = rows_ND.new_zeros(routing.num_tokens, rows_ND.shape[1])
        return routed_TD.index_add_(0, branch_N // routing.num_experts_per_tok, weighted_ND)


class _CachedLayer(nn.Module):
    """Stands in for an MoE layer [B, T, D] -> [B, T, D]; outside of a cached step it is the layer itself."""

    def __init__(self, original: nn.Module, parts: MoEParts, block: int, current: _Current) -> None:
        super().__init__()
        self.original = original
        self._block = block
        self._current = current
        # Its own parameters are never used: built without memory, and replaced by the model's.
        with torch.device("meta"):
            layer = MoELayer(parts.hidden_size, parts.router, parts.num_experts, expert_width=1, shared_width=1)
        layer.dispatcher = _LoopDispatcher(parts.num_experts)
        layer.experts = parts.experts  # type: ignore[assignment]
        layer.shared_experts = parts.shared  # type: ignore[assignment]
        # Not a submodule: the model's parameters would appear twice in its state dict.
        self._layer = (layer,)

    def forward(self, x_BTD: Tensor) -> Tensor:
        cache = self._current.cache
        if cache is None:
            return torch.as_tensor(self.original(x_BTD))
        step = cache.block(self._block)
        layer = self._layer[0]
        if step.per_branch:
            return torch.as_tensor(layer(x_BTD, step))
        return step.serve("moe", x_BTD, lambda images: self.original(x_BTD[images]))


@dataclass
class Adapter:
    """A model with the branch cache under it. The model is called as ever; without ``at`` it is unchanged.

    Only MoE layers are cached; attention and everything else are computed in every step. One cached run at a time.
    """

    model: nn.Module
    parts: Mapping[str, MoEParts]
    _current: _Current = field(default_factory=_Current)

    def __post_init__(self) -> None:
        """Replace the layers that ``parts`` names by their paths, in place; UserError if there are none."""
        if not self.parts:
            raise UserError(f"{type(self.model).__name__} has no MoE layer: nothing to cache")
        for block, (path, parts) in enumerate(self.parts.items()):
            original = self.model.get_submodule(path)
            self._place(path, _CachedLayer(original, parts, block, self._current))

    def session(self, policy: Policy, requests: Sequence[Request], *, guided: bool) -> CacheSession:
        """The caches of one batch of images, with its statistics.

        With guidance the model's batch holds the images of ``requests`` twice, conditional ones first. Raises UserError
        for policies that need more of a model than its MoE layers.
        """
        if policy.unit == "network" or policy.refreshes_rows or policy.attention_sync:
            raise UserError(
                f"{type(policy).__name__} also decides about attention or the whole network, which an adapter does not "
                "cache: choose a policy of branches or modules with attention_sync off, such as moeca_forecast"
            )
        return CacheSession(
            policy,
            requests,
            guided=guided,
            num_blocks=len(self.parts),
            num_experts=max(parts.num_experts for parts in self.parts.values()),
            statistics=CacheStatistics(),
            device=next(self.model.parameters()).device,
        )

    @contextmanager
    def at(self, cache: StepCache) -> Iterator[None]:
        """Within it the model's next call is the denoising step of ``cache`` (``session.at(StepContext(...))``)."""
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
            self._place(path, layer.original)

    def _place(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, layer)


def branch_counts(statistics: CacheStatistics) -> dict[str, int]:
    """Branches of a run: routed, refreshed (unmatched ones among them), and served from the cache."""
    unmatched, served = statistics.total(Reason.UNMATCHED), statistics.total(Reason.SERVED)
    refreshed = sum(statistics.total(reason) for reason in REFRESHED)
    return {"routed": refreshed + served, "refreshed": refreshed, "unmatched": unmatched, "served": served}

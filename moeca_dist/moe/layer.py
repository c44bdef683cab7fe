"""One MoE layer: router, branch cache, exchange and experts meet here, in the order in which a token sees them.

Shape suffixes: B images, T tokens (of one image with B, else of all), D hidden size, N branches, R rows computed here.
"""

from torch import Tensor, nn

from moeca_dist.cache.layer_cache import LayerCache, RefreshPlan
from moeca_dist.cache.module_cache import TokenIndex
from moeca_dist.moe.experts import Experts
from moeca_dist.moe.router import Router
from moeca_dist.parallel.dispatcher import Dispatcher, LocalDispatcher
from moeca_dist.types import Routing


class MoELayer(nn.Module):
    """router -> dispatch -> experts -> combine, plus the shared expert.

    It is built for one device with all experts. ``models.parallelize`` leaves a rank's own experts here and swaps the
    dispatcher. With a cache only the branches travel that its policy refreshes, and values are kept at home.
    """

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None, num_experts: int) -> None:
        """Join the parts of a layer.

        Args:
            experts: those of this rank, all at first. Stacked weights, or modules of any library.
            shared: acts on each token by itself. None: the layer adds its own input in its place.
            num_experts: of all ranks.
        """
        super().__init__()
        self.gate = router
        self.experts = experts
        self.shared_experts = shared
        self.num_experts = num_experts
        self.local_expert_ids = tuple(range(num_experts))
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return [B, T, D] with every branch computed: the exact path. Owners return one weighted sum per token."""
        x_TD = x_BTD.flatten(0, 1)
        routing = self.gate(x_TD)
        self.dispatcher.count_exact(routing, x_TD)
        sending = self.dispatcher.dispatch(x_TD, routing.branches, routing.gate_N)
        shared_TD = self._shared(x_TD)  # while rows travel
        arrived = sending.wait()
        outputs_RD = self.experts(arrived.rows_RD, arrived.rows_per_expert_L)
        routed_TD = self.dispatcher.combine_sums(outputs_RD, arrived, routing).wait()
        return (routed_TD + shared_TD).view_as(x_BTD)

    def plan(self, x_BTD: Tensor, cache: LayerCache) -> RefreshPlan:
        """Route, and decide which branches are computed now. Rows of attention may be refreshed before ``cached``."""
        return cache.plan(self._route(x_BTD, cache))

    def cached(self, x_BTD: Tensor, plan: RefreshPlan, cache: LayerCache, tokens: TokenIndex | None = None) -> Tensor:
        """Return [B, T, D] with the branches of ``plan`` computed and the others served.

        ``tokens``: those whose input is newer than the plan, for which the shared expert is computed as well.
        """
        x_TD = x_BTD.flatten(0, 1)
        sending = self.dispatcher.dispatch(x_TD, plan.branches)  # no collective if no rank computes a branch
        shared_BTD = self._cached_shared(x_BTD, cache, tokens)  # while rows travel
        arrived = sending.wait()
        outputs_RD = self.experts(arrived.rows_RD, arrived.rows_per_expert_L)
        rows_ND = self.dispatcher.combine(outputs_RD, arrived).wait()
        if cache.is_full:
            routed_TD = self.dispatcher.weighted_sum(rows_ND, arrived, plan.routing)
            cache.keep_all(plan, rows_ND.index_select(0, arrived.slot_of_branch_N))
        else:
            routed_TD = cache.merge(plan, rows_ND, arrived.slot_of_branch_N)
        return (routed_TD + shared_BTD.flatten(0, 1)).view_as(x_BTD)

    def _route(self, x_BTD: Tensor, cache: LayerCache) -> Routing:
        x_TD = x_BTD.flatten(0, 1)
        cache.count("router", x_TD)
        routing = self.gate(x_TD)
        self.dispatcher.count_exact(routing, x_TD)
        return routing

    def _shared(self, x: Tensor) -> Tensor:
        # A layer whose shared expert is disabled adds its own input in its place.
        return self.shared_experts(x) if self.shared_experts is not None else x

    def _cached_shared(self, x_BTD: Tensor, cache: LayerCache, tokens: TokenIndex | None) -> Tensor:
        if cache.computes_modules:
            shared_BTD = self._shared(x_BTD)
            cache.keep("shared", shared_BTD)
            return shared_BTD
        shared_BTD = cache.forecast("shared").sum()
        if tokens is not None:
            fresh_ND = self._shared(tokens.of(x_BTD))
            cache.keep_tokens("shared", tokens, fresh_ND)
            shared_BTD[tokens.image_N, tokens.position_N] = fresh_ND
        return shared_BTD

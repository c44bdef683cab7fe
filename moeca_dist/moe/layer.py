"""The one place where router, branch cache, exchange and experts meet.

Shape suffixes: B images, T tokens (of one image with B, else of all), D hidden size, K routed experts per token, N
branches, R rows computed here.
"""

import torch
from torch import Tensor, nn

from moeca_dist.cache.session import BlockStep
from moeca_dist.moe.cached import decide, segment_parts, store_fresh
from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.parallel.dispatch import Dispatcher, LocalDispatcher, weighted_sum
from moeca_dist.types import Branches, Routing


class MoELayer(nn.Module):
    """router -> dispatch -> grouped experts -> combine, plus the shared expert.

    Built for one device with all experts; ``models.parallelize`` leaves a rank's own experts here and swaps the
    dispatcher. With a cache only the branches travel that its policy refreshes; without one, all do.
    """

    def __init__(
        self, hidden_size: int, router: nn.Module, num_experts: int, expert_width: int, shared_width: int
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = RoutedExperts(hidden_size, expert_width, num_experts)
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None
        self.num_experts = num_experts
        self.local_expert_ids = tuple(range(num_experts))
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)

    def forward(self, x_BTD: Tensor, cache: BlockStep | None = None) -> Tensor:
        """``cache=None`` computes every branch: the exact path."""
        x_TD = x_BTD.flatten(0, 1)
        routing = self.gate(x_TD)
        if cache is None:
            routed_TD = self._all_branches(x_TD, routing)[0]
            shared_TD = self._shared(x_TD)
        else:
            cache.statistics.modules["router"] += x_BTD.shape[0]
            routed_TD = self._full_step(x_TD, routing, cache) if cache.all_full else self._step(x_TD, routing, cache)
            shared_TD = cache.serve("shared", x_BTD, lambda images: self._shared(x_BTD[images])).flatten(0, 1)
        return (routed_TD + shared_TD).view_as(x_BTD)

    def _shared(self, x: Tensor) -> Tensor:
        # A layer whose shared expert is disabled adds its own input in its place.
        return self.shared_experts(x) if self.shared_experts is not None else x

    def _compute(self, x_TD: Tensor, branches: Branches) -> tuple[Tensor, Tensor]:
        """Outputs [N, D] of some branches, wherever their experts are, and the position of each branch among them."""
        dispatched = self.dispatcher.dispatch(x_TD, branches)
        outputs_RD = self.experts(dispatched.rows_RD, dispatched.rows_per_expert_L)
        return self.dispatcher.combine(outputs_RD, dispatched), dispatched.slot_of_branch_N

    def _all_branches(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        rows_ND, slot_N = self._compute(x_TD, routing.all_branches())
        return weighted_sum(rows_ND, slot_N.view_as(routing.expert_ids_TK), routing.gates_TK), rows_ND, slot_N

    def _full_step(self, x_TD: Tensor, routing: Routing, cache: BlockStep) -> Tensor:
        routed_TD, rows_ND, slot_N = self._all_branches(x_TD, routing)
        values_TKD = rows_ND.index_select(0, slot_N).view(*routing.expert_ids_TK.shape, x_TD.shape[1])
        for part in segment_parts(x_TD, cache):
            ids_TK = routing.expert_ids_TK[part.tokens]
            part.branches.store_all(ids_TK, values_TKD[part.tokens], part.branches.match(ids_TK), cache.step.index)
            cache.statistics.full[cache.key] += ids_TK.numel()
        cache.statistics.count_experts(cache.block, routing.expert_ids_TK, self.num_experts)
        return routed_TD

    def _step(self, x_TD: Tensor, routing: Routing, cache: BlockStep) -> Tensor:
        """A step in which some segments are served from the cache; all refreshed branches share one exchange."""
        parts = segment_parts(x_TD, cache)
        decisions = [decide(part, routing, cache) for part in parts]
        refresh_TK = torch.cat([decision.refresh_TK for decision in decisions])
        # NOTE: a host synchronisation on CUDA: the number of refreshed branches decides the shapes.
        branch_N = refresh_TK.flatten().nonzero().squeeze(1)
        branches = Branches(branch_N // routing.num_experts_per_tok, routing.expert_ids_TK.flatten()[branch_N])
        cache.statistics.count_experts(cache.block, branches.expert_ids_N, self.num_experts)
        rows_ND, slot_N = self._compute(x_TD, branches)
        fresh_ND = rows_ND.index_select(0, slot_N)
        routed_TD = torch.cat([decision.served_TD for decision in decisions])
        gates_N = routing.gates_TK.flatten()[branch_N].to(fresh_ND.dtype)
        routed_TD.index_add_(0, branches.token_N, fresh_ND * gates_N[:, None])
        store_fresh(parts, decisions, branches, branch_N, fresh_ND, cache)
        return routed_TD

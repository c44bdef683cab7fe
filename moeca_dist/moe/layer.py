"""The one place where router, branch cache, exchange and experts meet.

Shape suffixes: B images, T tokens (of one image with B, else of all), D hidden size, K routed experts per token, N
branches, R rows computed here.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from moeca_dist.cache.block import BlockStep
from moeca_dist.cache.branches import Match
from moeca_dist.cache.rows import Rows
from moeca_dist.moe.cached import (
    LayerPlan,
    count_reasons,
    decide,
    fresh_parts,
    observe,
    route,
    segment_parts,
    serve,
)
from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.moe.owner import routed_at_owners
from moeca_dist.moe.router import Router
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.dispatch import DispatchedRows, Dispatcher, LocalDispatcher
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.references import BlockCoding
from moeca_dist.types import Branches


class MoELayer(nn.Module):
    """router -> dispatch -> grouped experts -> combine, plus the shared expert.

    Built for one device with all experts; ``models.parallelize`` leaves a rank's own experts here and swaps the
    dispatcher. With a cache only the branches travel that its policy refreshes; without one, all do.
    """

    def __init__(
        self, hidden_size: int, router: Router, num_experts: int, expert_width: int, shared_width: int
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = RoutedExperts(hidden_size, expert_width, num_experts)
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None
        self.num_experts = num_experts
        self.local_expert_ids = tuple(range(num_experts))
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)

    def forward(self, x_BTD: Tensor, cache: BlockStep | None = None, coding: BlockCoding | None = None) -> Tensor:
        """``cache=None`` computes every branch, and ``coding=None`` sends rows as they are: the exact path."""
        if cache is not None:
            return self.compute(x_BTD, self.decide(x_BTD, cache), cache, coding=coding)
        x_TD = x_BTD.flatten(0, 1)
        routing = self.gate(x_TD)
        self.dispatcher.count_exact(routing, x_TD)
        # Nothing is kept, so outputs are summed up where the experts are.
        dispatcher = self.dispatcher.coded(coding)
        coming = dispatcher.dispatch(x_TD, routing.all_branches(), routing.gates_TK.flatten())
        shared_TD = self._shared(x_TD)  # while rows travel
        dispatched = coming.wait()
        outputs_RD = self.experts(dispatched.rows_RD, dispatched.rows_per_expert_L)
        returning = self.dispatcher.combine_sums(outputs_RD, dispatched, routing)
        return (returning.wait() + shared_TD).view_as(x_BTD)

    def decide(self, x_BTD: Tensor, cache: BlockStep) -> LayerPlan:
        """Route, and ask the policy which branches are computed now."""
        x_TD = x_BTD.flatten(0, 1)
        plan = self._plan(x_TD, cache)
        self.dispatcher.count_exact(plan.routing, x_TD)
        with cache.timer.section("bookkeeping"):
            count_reasons(plan, cache, self.num_experts)
        return plan

    def _plan(self, x_TD: Tensor, cache: BlockStep) -> LayerPlan:
        parts = segment_parts(x_TD, cache)
        cache.count("router", x_TD)
        if cache.owned is not None:
            routing = self.gate(x_TD)
            matches = [part.kept.home.match(routing.expert_ids_TK[part.tokens]) for part in parts]
        elif cache.all_full:
            # At home a full step needs no decisions; owners are told what to keep in every step.
            return LayerPlan(self.gate(x_TD), parts, [])
        else:
            routing, matches = route(x_TD, self.gate, parts)
        with cache.timer.section("bookkeeping"):
            pairs = zip(parts, matches, strict=True)
            return LayerPlan(routing, parts, [decide(part, routing, match, cache) for part, match in pairs])

    def compute(
        self,
        x_BTD: Tensor,
        plan: LayerPlan,
        cache: BlockStep,
        rows: Rows | None = None,
        coding: BlockCoding | None = None,
    ) -> Tensor:
        """Carry out a plan; the shared expert is refreshed for ``rows``, whose inputs may be newer than the plan."""
        x_TD = x_BTD.flatten(0, 1)
        coming = self._routed(x_TD, plan, cache, coding)
        shared_BTD = self._shared_output(x_BTD, cache, rows)  # while rows travel
        routed_TD = coming.wait()
        return (routed_TD + shared_BTD.flatten(0, 1)).view_as(x_BTD)

    def _shared_output(self, x_BTD: Tensor, cache: BlockStep, rows: Rows | None) -> Tensor:
        """[B, T, D], computed or from the cache, and computed for ``rows``; depends on no other rank."""

        def shared(images: slice) -> Tensor:
            with cache.timer.section("experts"):
                return self._shared(x_BTD[images])

        shared_BTD = cache.serve("shared", x_BTD, shared)
        if rows is not None:
            fresh_ND = self._shared(x_BTD.flatten(0, 1).index_select(0, rows.flat_N))
            cache.refresh_rows("shared", shared_BTD, rows, fresh_ND)
        return shared_BTD

    def _routed(self, x_TD: Tensor, plan: LayerPlan, cache: BlockStep, coding: BlockCoding | None) -> Pending[Tensor]:
        """[T, D], rows being on their way. The choice of placement: branch values beside the experts, or at home."""
        if cache.owned is not None:
            assert isinstance(self.dispatcher, AllToAllDispatcher)
            return routed_at_owners(x_TD, plan, cache, self.dispatcher.pairs, self.experts, coding)
        dispatcher = self.dispatcher.coded(coding)
        return (self._full_step if cache.all_full else self._step)(x_TD, plan, cache, dispatcher)

    def _shared(self, x: Tensor) -> Tensor:
        # A layer whose shared expert is disabled adds its own input in its place.
        return self.shared_experts(x) if self.shared_experts is not None else x

    def _computed(self, dispatched: DispatchedRows) -> Pending[Tensor]:
        """Outputs [N, D] of dispatched branches, on their way back."""
        outputs_RD = self.experts(dispatched.rows_RD, dispatched.rows_per_expert_L)
        return self.dispatcher.combine(outputs_RD, dispatched)

    def _full_step(self, x_TD: Tensor, plan: LayerPlan, cache: BlockStep, dispatcher: Dispatcher) -> Pending[Tensor]:
        routing = plan.routing

        def finish(dispatched: DispatchedRows) -> Tensor:
            returning = self._computed(dispatched)
            with cache.timer.section("bookkeeping"):
                matches = self._match_all(plan)  # while outputs travel
            rows_ND = returning.wait()
            routed_TD = self.dispatcher.weighted_sum(rows_ND, dispatched, routing)
            with cache.timer.section("bookkeeping"):
                self._keep_all(rows_ND.index_select(0, dispatched.slot_of_branch_N), plan, matches, cache)
            return routed_TD

        return dispatcher.dispatch(x_TD, routing.all_branches()).then(finish)

    def _match_all(self, plan: LayerPlan) -> list[Match]:
        """Where a full step will store its branches, segment by segment."""
        matches = []
        for part in plan.parts:
            mine = part.routing(plan.routing)
            observe(part, mine)
            matches.append(part.kept.branches.match(mine.expert_ids_TK))
        return matches

    def _keep_all(self, fresh_ND: Tensor, plan: LayerPlan, matches: Sequence[Match], cache: BlockStep) -> None:
        """Store all branches of a full step; ``fresh_ND`` in the order of the routing."""
        routing = plan.routing
        values_TKD = fresh_ND.view(*routing.expert_ids_TK.shape, fresh_ND.shape[1])
        for part, match in zip(plan.parts, matches, strict=True):
            mine, branches = part.routing(routing), part.kept.branches
            gates_TK = cache.policy.reference_gates(mine)
            branches.store_all(mine.expert_ids_TK, values_TKD[part.tokens], match, cache.step.index, gates_TK)

    def _step(self, x_TD: Tensor, plan: LayerPlan, cache: BlockStep, dispatcher: Dispatcher) -> Pending[Tensor]:
        """A step in which some segments are served from the cache; all refreshed branches share one exchange."""
        routing = plan.routing
        with cache.timer.section("bookkeeping"):
            branch_N = plan.refreshed_branches()
            branches = Branches(branch_N // routing.num_experts_per_tok, routing.expert_ids_TK.flatten()[branch_N])

        def finish(dispatched: DispatchedRows) -> Tensor:
            rows_ND = self._computed(dispatched).wait()
            with cache.timer.section("bookkeeping"):
                return serve(plan, fresh_parts(plan, rows_ND, branch_N, dispatched.slot_of_branch_N), cache)

        return dispatcher.dispatch(x_TD, branches).then(finish)

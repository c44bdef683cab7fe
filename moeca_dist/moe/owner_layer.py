"""One MoE layer with branch values at the owners: the home rank decides, the owners keep, compute and sum up.

Shape suffixes: B images, T tokens (of one image with B, else of all), D hidden size, R branches asked of this rank,
N those of them that are refreshed (or branches of this rank), S pairs of a token and this rank, M pairs of this rank's
tokens and owners.
"""

import torch
from torch import Tensor

from moeca_dist.cache.layer_cache import LayerCache, RefreshPlan
from moeca_dist.cache.module_cache import TokenIndex
from moeca_dist.cache.owner_cache import OwnerBranchStore, OwnerCache
from moeca_dist.moe.layer import MoELayer
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.owner_exchange import OwnerRequest, ReceivedRequest
from moeca_dist.parallel.row_packing import token_sums


class OwnerMoELayer(MoELayer):
    """A MoE layer whose branch values are kept by the ranks that own the experts.

    A token travels if any of its branches is refreshed or dropped. Each owner of its experts then returns one row: the
    weighted sum of the branches that it holds. All ranks of the group take part in every evaluation.
    """

    def plan(self, x_BTD: Tensor, cache: LayerCache) -> RefreshPlan:
        routing = self._route(x_BTD, cache)
        with cache.timer.section("bookkeeping"):
            match = _kept(cache).table.match(routing)
            refresh_N = cache.decide(routing, match)
        # Owners are told what to keep in full steps too.
        return RefreshPlan(routing, match, torch.ones_like(match.found_N) if refresh_N is None else refresh_N)

    def cached(self, x_BTD: Tensor, plan: RefreshPlan, cache: LayerCache, tokens: TokenIndex | None = None) -> Tensor:
        assert isinstance(self.dispatcher, AllToAllDispatcher)
        assert plan.match is not None and plan.refresh_N is not None
        exchange, kept, x_TD = self.dispatcher.owner_exchange, _kept(cache), x_BTD.flatten(0, 1)
        with cache.timer.section("bookkeeping"):
            owner_E, _ = exchange.owners.on(x_TD.device)
            slot_N, has_dropped_T = kept.table.assign(plan.routing, plan.match, kept.slots, owner_E)
            touched_T = plan.routing.tokens_with(plan.refresh_N) | has_dropped_T
            request = OwnerRequest(plan.routing, touched_T, plan.refresh_N, plan.match.found_N, slot_N)
        sending = exchange.dispatch(x_TD, request, kept.slots.capacities)
        shared_BTD = self._cached_shared(x_BTD, cache, tokens)  # while rows travel
        received = sending.wait()
        sums_SD = self._sums(received, kept.store, x_TD, cache)
        rows_MD = exchange.combine(sums_SD, received).wait()
        with cache.timer.section("bookkeeping"):
            fresh_TD = token_sums(rows_MD, received.sent.token_M, x_TD.shape[0])
            changed_T = plan.routing.tokens_with(~plan.match.found_N) | has_dropped_T
            routed_TD = kept.table.serve(touched_T, changed_T, fresh_TD, cache.step.index)
        return (routed_TD + shared_BTD.flatten(0, 1)).view_as(x_BTD)

    def _sums(self, received: ReceivedRequest, store: OwnerBranchStore, x_TD: Tensor, cache: LayerCache) -> Tensor:
        """Compute and keep the refreshed branches that are asked of this rank. Returns the sums [S, D] of all."""
        step = cache.step.index
        # NOTE: a host synchronisation on CUDA: the number of refreshed branches decides the shapes.
        branch_N = received.refresh_R.nonzero().squeeze(1)
        expert_N, order_N = received.local_expert_R[branch_N].sort(stable=True)
        branch_N = branch_N[order_N]
        rows_ND = received.hidden_HD.index_select(0, received.hidden_row_R[branch_N])
        fresh_ND = self.experts(rows_ND, torch.bincount(expert_N, minlength=len(self.local_expert_ids)))
        with cache.timer.section("bookkeeping"):
            store.make_room(received.capacities, x_TD)
            row_R = store.rows(received.home_R, received.slot_R)
            store.store(row_R[branch_N], received.found_R[branch_N], fresh_ND, step)
            return store.weighted_sums(row_R, received.gates_R, received.starts_S, step, (branch_N, fresh_ND))


def _kept(cache: LayerCache) -> OwnerCache:
    assert isinstance(cache.store.branches, OwnerCache)
    return cache.store.branches

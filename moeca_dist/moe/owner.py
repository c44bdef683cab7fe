"""One MoE layer in placement ``owner``: the home rank decides, the owners keep, compute and sum up.

Shape suffixes: T tokens of this rank, K routed experts per token, D hidden size, R branches asked of this rank,
N those of them that are refreshed, S pairs of a token and this rank.
"""

import torch
from torch import Tensor

from moeca_dist.cache.block import BlockStep
from moeca_dist.cache.owned import OwnedBranches
from moeca_dist.moe.cached import LayerPlan
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.parallel.pairs import ArrivedPairs, Asked, PairExchange
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.references import BlockCoding
from moeca_dist.parallel.wire import token_sums


def routed_at_owners(
    x_TD: Tensor,
    plan: LayerPlan,
    cache: BlockStep,
    pairs: PairExchange,
    experts: RoutedExperts,
    coding: BlockCoding | None = None,
) -> Pending[Tensor]:
    """[T, D] routed sums. A collective of the group, like every exchange: all its ranks call it in every step."""
    assert cache.owned is not None
    with cache.timer.section("bookkeeping"):
        asked = _ask(plan, cache, pairs)
    coming = pairs.dispatch(x_TD, asked, cache.owned.pool.capacities, coding)
    return coming.then(lambda arrived: _sums(x_TD, plan, cache, asked, arrived, pairs, experts))


def _sums(
    x_TD: Tensor,
    plan: LayerPlan,
    cache: BlockStep,
    asked: Asked,
    arrived: ArrivedPairs,
    pairs: PairExchange,
    experts: RoutedExperts,
) -> Tensor:
    """This rank as an owner, then as a home."""
    assert cache.owned is not None
    store, step = cache.owned.store, cache.step.index
    with cache.timer.section("bookkeeping"):
        store.make_room(arrived.capacities, x_TD)
        fresh = _refresh(arrived, store, experts, cache)
        places_R = store.places(arrived.home_R, arrived.row_R)
        sums_SD = store.weighted_sums(places_R, arrived.gates_R, arrived.starts_S, step, fresh)
    rows_MD = pairs.combine(sums_SD, arrived).wait()
    with cache.timer.section("bookkeeping"):
        fresh_TD = token_sums(rows_MD, arrived.sent.token_M, x_TD.shape[0])
        touched_T, changed_T = asked.refresh_TK.any(1), (~asked.found_TK).any(1)
        served = [
            part.kept.home.serve(touched_T[part.tokens], changed_T[part.tokens], fresh_TD[part.tokens], step)
            for part in plan.parts
        ]
        return torch.cat(served)


def _ask(plan: LayerPlan, cache: BlockStep, pairs: PairExchange) -> Asked:
    """What every segment's policy wants refreshed, and where the home table has put it."""
    assert cache.owned is not None
    routing = plan.routing
    owner_of_expert_E = pairs.owners(routing.expert_ids_TK.device)
    rows = []
    for part, decision in zip(plan.parts, plan.decisions, strict=True):
        home, ids_TK = part.kept.home, routing.expert_ids_TK[part.tokens]
        rows.append(home.assign(ids_TK, decision.match, cache.owned.pool, owner_of_expert_E))
    refresh_TK = torch.cat([decision.refresh_TK for decision in plan.decisions])
    found_TK = torch.cat([decision.match.found_TK for decision in plan.decisions])
    return Asked(routing.expert_ids_TK, routing.gates_TK, refresh_TK, found_TK, torch.cat(rows))


def _refresh(
    arrived: ArrivedPairs, store: OwnedBranches, experts: RoutedExperts, cache: BlockStep
) -> tuple[Tensor, Tensor]:
    """Compute the refreshed branches, grouped by expert, and keep them: which they are [N], and their values [N, D]."""
    # NOTE: a host synchronisation on CUDA: the number of refreshed branches decides the shapes.
    branch_N = arrived.refresh_R.nonzero().squeeze(1)
    expert_N, order_N = arrived.local_expert_R[branch_N].sort(stable=True)
    branch_N = branch_N[order_N]
    rows_ND = arrived.hidden_HD.index_select(0, arrived.hidden_row_R[branch_N])
    with cache.timer.section("experts"):
        fresh_ND = experts(rows_ND, torch.bincount(expert_N, minlength=experts.num_experts))
    places_N = store.places(arrived.home_R[branch_N], arrived.row_R[branch_N])
    store.store(places_N, arrived.found_R[branch_N], fresh_ND, cache.step.index)
    return branch_N, fresh_ND

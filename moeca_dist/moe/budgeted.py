"""One MoE layer in exchange mode ``budget``: no shape follows from the data, and the host never waits for the device.

A branch that finds no room waits: where its stored value is that of its expert it is served once more. Where the cache
holds nothing of it, the token keeps an expert that left its top-k, with its current gate, until there is room. Steps
with full parts follow the same decisions, but their rows travel as in mode ``exact``.

Shape suffixes: T tokens (of a segment, of all in a routing), D hidden size, K routed experts per token, E experts,
B images of one segment, X branches of one image, G groups of experts, R rows of an image and group, P ranks of the
group, S rows that go to one rank, N rows of one segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.cache.branch_cache import Match
from moeca_dist.cache.budget import Budget, Candidates, chosen, select
from moeca_dist.cache.layer_cache import BlockStep
from moeca_dist.cache.statistics import Reason
from moeca_dist.moe.cached_layer import (
    BudgetedRows,
    Decision,
    LayerPlan,
    Part,
    computed,
    judge,
    observe,
    refreshed,
    route,
    segment_parts,
    served,
)
from moeca_dist.moe.router import Router
from moeca_dist.parallel.dispatcher import Dispatcher, FixedRows
from moeca_dist.types import Routing


@dataclass(frozen=True)
class _Room:
    """A segment's decision, the experts that its tokens have now, and the branches that got a row."""

    decision: Decision
    expert_ids_TK: Tensor
    branch_BGR: Tensor | None


def budgeted_layer(x_TD: Tensor, router: Router, cache: BlockStep, dispatcher: Dispatcher) -> LayerPlan:
    """What the layer does now; not a collective."""
    assert cache.budget is not None
    parts = segment_parts(x_TD, cache)
    cache.count("router", x_TD)
    if cache.all_full:
        current = router(x_TD)
    else:
        routed = route(x_TD, router, parts, with_scores=True)
        current = routed.routing
    dispatcher.count_exact(current, x_TD)
    with cache.timer.section("bookkeeping"):
        for part in parts:
            if part.segment.full:
                part.kept.backlog.clear()
        if cache.all_full:
            return LayerPlan(current, parts, [])
        is_fixed = not any(part.segment.full for part in parts)
        rooms = [
            _decide(part, part.routing(current), match, cache, is_fixed)
            for part, match in zip(parts, routed.matches, strict=True)
        ]
        ids_TK = torch.cat([room.expert_ids_TK for room in rooms])
        assert routed.scores_TE is not None
        # The same numbers where all tokens have the experts that the router chose.
        routing = Routing(ids_TK, router.gates(routed.scores_TE, ids_TK))
        fixed = _fixed_rows(parts, rooms, routing, cache.budget) if is_fixed else None
        return LayerPlan(routing, parts, [room.decision for room in rooms], fixed=fixed)


def _decide(part: Part, mine: Routing, match: Match, cache: BlockStep, is_fixed: bool) -> _Room:
    budget = cache.budget
    assert budget is not None
    observe(part, mine)
    branches = part.kept.branches
    if part.segment.full:
        return _Room(computed(match), mine.expert_ids_TK, None)
    reason_TK, plan = judge(part, mine, match, cache)
    waited_TK = part.kept.backlog.waited(mine.expert_ids_TK)
    priority_TK = mine.gates_TK.float() if plan.priority_TK is None else plan.priority_TK
    if plan.priority_TK is None and (plan.judges_matched or budget.fill):
        priority_TK = priority_TK * branches.expected_change(match, cache.step.index)
    wanted_TK = refreshed(reason_TK) | (waited_TK > 0)
    candidates = _candidates(part, mine, match, wanted_TK, waited_TK, priority_TK, budget)
    key_BX = candidates.keys(fill=budget.fill)
    branch_BGR = select(key_BX, candidates.group_BX, budget.num_groups, budget.rows[cache.block])
    gets_TK = chosen(branch_BGR, key_BX.shape[1]).reshape(wanted_TK.shape)
    deferred_TK = wanted_TK & ~gets_TK
    cache.statistics.count_demand(cache.block, candidates.demand(budget.num_groups), key_BX.shape[1])
    part.kept.backlog.note(mine.expert_ids_TK, deferred_TK, waited_TK)
    reason_TK = reason_TK.masked_fill(gets_TK & ~refreshed(reason_TK), Reason.SCORE)
    reason_TK = reason_TK.masked_fill(deferred_TK, Reason.DEFERRED)
    match, ids_TK = branches.stand_ins(match, gets_TK, mine.expert_ids_TK)
    decision = Decision(match, gets_TK, reason_TK) if is_fixed else served(match, reason_TK)
    return _Room(decision, ids_TK, branch_BGR)


def _candidates(
    part: Part, mine: Routing, match: Match, wanted_TK: Tensor, waited_TK: Tensor, priority_TK: Tensor, budget: Budget
) -> Candidates:
    unmatched_TK = ~match.found_TK
    # Nothing is known of how an unmatched branch changes: its gate says what is lost without it.
    score_TK = torch.where(unmatched_TK, mine.gates_TK.float(), priority_TK.float())
    shape = (part.num_images, part.tokens_per_image * mine.num_experts_per_tok)
    return Candidates(
        budget.group_of_expert_E[mine.expert_ids_TK].view(shape),
        wanted_TK.view(shape),
        unmatched_TK.view(shape),
        waited_TK.view(shape),
        score_TK.view(shape),
    )


def _fixed_rows(parts: Sequence[Part], rooms: Sequence[_Room], routing: Routing, budget: Budget) -> BudgetedRows:
    """The rows of all segments, rank by rank, then segment, image and group; ranks with fewer images send padding."""
    ranks, groups, k = budget.num_ranks, budget.groups_per_rank, routing.num_experts_per_tok
    most = parts[0].num_images if ranks == 1 else budget.most_images
    tokens, experts, kept = [], [], []
    for part, room in zip(parts, rooms, strict=True):
        assert room.branch_BGR is not None
        images, rows = part.num_images, room.branch_BGR.shape[2]
        per_image = part.tokens_per_image * k
        image_B11 = torch.arange(images, device=room.branch_BGR.device)[:, None, None]
        is_branch = room.branch_BGR < per_image
        branch_BGR = torch.where(is_branch, image_B11 * per_image + room.branch_BGR, images * per_image)
        if images:
            first_BGR = branch_BGR.clamp(max=images * per_image - 1)
            expert_BGR = part.routing(routing).expert_ids_TK.flatten()[first_BGR]
        else:
            first_BGR = expert_BGR = branch_BGR
        token_BGR = torch.where(is_branch, part.tokens.start + first_BGR // k, 0)
        expert_BGR = torch.where(is_branch, expert_BGR, budget.num_experts)
        kept.append((images, rows, _rank_by_rank(branch_BGR, ranks, groups)))
        tokens.append(_padded(_rank_by_rank(token_BGR, ranks, groups), most, 0))
        experts.append(_padded(_rank_by_rank(expert_BGR, ranks, groups), most, budget.num_experts))
    fixed = FixedRows(torch.cat(tokens, 1), torch.cat(experts, 1))
    slots = torch.arange(fixed.token_PS.numel(), device=fixed.token_PS.device)
    slot_PVS = slots.view(ranks, len(parts), -1)
    lists = []
    for index, (images, rows, branch_PBR) in enumerate(kept):
        mine = slot_PVS[:, index, : images * groups * rows]
        lists.append((branch_PBR.flatten(), mine.flatten()))
    return BudgetedRows(fixed, lists)


def _rank_by_rank(of_BGR: Tensor, ranks: int, groups: int) -> Tensor:
    """[B, P * g, R] -> [P, B, g * R]."""
    images, _, rows = of_BGR.shape
    return of_BGR.view(images, ranks, groups, rows).transpose(0, 1).reshape(ranks, images, groups * rows)


def _padded(of_PBR: Tensor, images: int, value: int) -> Tensor:
    """[P, B, R] -> [P, images * R]"""
    return F.pad(of_PBR, (0, 0, 0, images - of_PBR.shape[1]), value=value).flatten(1)

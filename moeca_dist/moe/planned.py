"""One MoE layer in exchange mode ``planned``: it carries out what the step before decided, and decides for the next.

A token keeps the experts that the router chose one step ago. Their gates are the current ones: the scores of this
step, normalised over the kept experts where the router normalises over the chosen. An expert that enters the top-k is
computed one step later, and one that leaves it is served one step longer. Full steps follow the current routing.

Shape suffixes: T tokens (of a segment, of all in a routing), D hidden size, K routed experts per token, E experts,
P ranks of the group, L MoE blocks, S segments, C counts of a block.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moeca_dist.cache.block import BlockStep
from moeca_dist.cache.planned import BlockPlan, SegmentPlan
from moeca_dist.moe.cached import Decision, LayerPlan, Part, choose, computed, observe, segment_parts, served
from moeca_dist.moe.router import Router
from moeca_dist.parallel.dispatch import Dispatcher
from moeca_dist.types import Routing, StepContext


def planned_layer(x_TD: Tensor, router: Router, cache: BlockStep, dispatcher: Dispatcher) -> LayerPlan:
    """What the layer does now. A collective of the group where it is the first to ask in a step without full parts."""
    assert cache.ahead is not None
    scores_TE = router.scores(x_TD)
    current = router.route(scores_TE)
    dispatcher.count_exact(current, x_TD)
    cache.count("router", x_TD)
    with cache.timer.section("bookkeeping"):
        parts = segment_parts(x_TD, cache)
        if cache.all_full:
            return LayerPlan(current, parts, [], current)
        plans = cache.ahead.now.blocks[cache.block].segments
        ids_TK = torch.cat(
            [
                current.expert_ids_TK[part.tokens] if plan is None else plan.expert_ids_TK
                for part, plan in zip(parts, plans, strict=True)
            ]
        )
        routing = Routing(ids_TK, router.gates(scores_TE, ids_TK))
        traffic_PC = None
        if not any(part.segment.full for part in parts):
            traffic_PC = cache.ahead.now.agreed(cache.block, dispatcher.agree)
        decisions = []
        for index, (part, plan) in enumerate(zip(parts, plans, strict=True)):
            observe(part, part.routing(current))
            refreshed = None
            if traffic_PC is not None:
                refreshed = int(traffic_PC[dispatcher.rank, dispatcher.num_counts + index])
            decisions.append(_decision(part, plan, part.routing(routing), refreshed))
        sizes = None if traffic_PC is None else traffic_PC[:, : dispatcher.num_counts]
        return LayerPlan(routing, parts, decisions, current, sizes)


def plan_next(plan: LayerPlan, cache: BlockStep, dispatcher: Dispatcher) -> None:
    """Decide for the next step, from the current routing and from what is stored by now."""
    assert cache.ahead is not None and plan.current is not None
    # The time of the next step is not known here; no decision on branches depends on it.
    step = replace(cache.step, index=cache.step.index + 1)
    if step.index == step.num_steps:
        return
    segments = tuple(_ahead(part, plan.current, step, cache) for part in plan.parts)
    known = [segment for segment in segments if segment is not None]
    counts_C = None
    if len(known) == len(segments):
        ids_TK = torch.cat([segment.expert_ids_TK for segment in known])
        refresh_TK = torch.cat([segment.refresh_TK for segment in known])
        refreshed_S = torch.stack([segment.refresh_TK.sum() for segment in known])
        counts_C = torch.cat([dispatcher.counts(ids_TK, refresh_TK), refreshed_S])
    cache.ahead.next.blocks[cache.block] = BlockPlan(segments, counts_C)


def _ahead(part: Part, current: Routing, step: StepContext, cache: BlockStep) -> SegmentPlan | None:
    if cache.policy.is_full(step, part.segment.half):
        return None
    mine = part.routing(current)
    match = part.kept.branches.match(mine.expert_ids_TK)
    return SegmentPlan(mine.expert_ids_TK, match, choose(part, mine, match, step, cache))


def _decision(part: Part, plan: SegmentPlan | None, mine: Routing, num_refreshed: int | None) -> Decision:
    if plan is None:
        return computed(part.kept.branches.match(mine.expert_ids_TK))
    return served(plan.match, plan.reason_TK, num_refreshed)

"""One MoE layer in a cache step, segment by segment: what is refreshed, what is served, what is stored.

Shape suffixes: T tokens (of a segment in ``Part``, of all in a routing), K routed experts per token, D hidden size,
N refreshed branches, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.block import BlockStep, Segment, SegmentCache
from moeca_dist.cache.branches import Match
from moeca_dist.cache.policy import LayerView
from moeca_dist.cache.rows import Rows
from moeca_dist.cache.statistics import Reason
from moeca_dist.kernels.select import kernels_for
from moeca_dist.kernels.types import FreshRows
from moeca_dist.moe.router import Router
from moeca_dist.types import Routing, positions


@dataclass(frozen=True)
class Part:
    """One segment's tokens among all of the rank's, and what the block keeps for it."""

    segment: Segment
    tokens: slice
    tokens_per_image: int
    kept: SegmentCache

    @property
    def num_images(self) -> int:
        return self.segment.images.stop - self.segment.images.start

    def routing(self, routing: Routing) -> Routing:
        """The segment's part of the routing of all tokens."""
        return Routing(routing.expert_ids_TK[self.tokens], routing.gates_TK[self.tokens])


@dataclass(frozen=True)
class Decision:
    """``reason_TK``: uint8, a ``Reason`` for every branch.

    ``refresh_TK``: branches that are computed; ``num_refreshed`` counts them, 0 in placement ``owner``, where no shape
    depends on it.
    """

    match: Match
    refresh_TK: Tensor
    reason_TK: Tensor
    num_refreshed: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does in one step; decided before anything is computed. No decisions where all segments are full."""

    routing: Routing
    parts: Sequence[Part]
    decisions: Sequence[Decision]

    def refreshed_branches(self) -> Tensor:
        """Positions int64 [N] of the refreshed ones among all branches, ascending."""
        refresh_TK = torch.cat([decision.refresh_TK for decision in self.decisions])
        return positions(refresh_TK.flatten(), sum(decision.num_refreshed for decision in self.decisions))

    def refreshed_rows(self) -> Rows:
        """Tokens of the segments that are served from the cache with at least one refreshed branch."""
        touched = [
            decision.refresh_TK.any(-1) & (not part.segment.full)
            for part, decision in zip(self.parts, self.decisions, strict=True)
        ]
        # NOTE: a host synchronisation on CUDA: the number of rows decides the shapes.
        return Rows(torch.cat(touched).nonzero().squeeze(1), self.parts[0].tokens_per_image)


def observe(part: Part, routing: Routing) -> None:
    """Remember which experts the segment's positions used, where the policy wants to know."""
    if part.kept.usage is not None:
        part.kept.usage.observe(routing.expert_ids_TK, part.num_images)


def segment_parts(x_TD: Tensor, cache: BlockStep) -> list[Part]:
    """The segments of the step as token ranges; every image has the same number of tokens."""
    num_images = cache.segments[-1].images.stop
    per_image = x_TD.shape[0] // num_images if num_images else 0
    return [
        Part(
            segment,
            slice(segment.images.start * per_image, segment.images.stop * per_image),
            per_image,
            kept,
        )
        for segment, kept in zip(cache.segments, cache.caches, strict=True)
    ]


def route(x_TD: Tensor, router: Router, parts: Sequence[Part]) -> tuple[Routing, list[Match]]:
    """Route all tokens, and find the branches of each segment at home."""
    fuses = kernels_for(x_TD.device).fuses_routing and not any(part.segment.full for part in parts)
    weights = router.weights() if fuses else None
    if weights is None:
        routing = router(x_TD)
        return routing, [part.kept.branches.match(routing.expert_ids_TK[part.tokens]) for part in parts]
    routed = [part.kept.branches.route(x_TD[part.tokens], weights) for part in parts]
    ids_TK, gates_TK = (torch.cat([getattr(each, name) for each in routed]) for name in ("expert_ids_TK", "gates_TK"))
    return Routing(ids_TK, gates_TK), [Match(each.entry_TK, each.found_TK) for each in routed]


def decide(part: Part, routing: Routing, match: Match, cache: BlockStep) -> Decision:
    """Ask the policy about a segment's branches."""
    mine = part.routing(routing)
    observe(part, mine)
    if part.segment.full:
        reason_TK = torch.full_like(match.found_TK, Reason.FULL, dtype=torch.uint8)
        return Decision(match, torch.ones_like(match.found_TK), reason_TK, reason_TK.numel())
    reason_TK = _judge(part, mine, match, cache)
    refresh_TK = reason_TK != Reason.SERVED
    if cache.owned is not None:
        return Decision(match, refresh_TK, reason_TK)
    # NOTE: a host synchronisation on CUDA: the number of refreshed branches decides the shapes.
    return Decision(match, refresh_TK, reason_TK, int(refresh_TK.sum()))


def _judge(part: Part, mine: Routing, match: Match, cache: BlockStep) -> Tensor:
    """Say which branches of a segment the policy refreshes in a cache step, and why: uint8 [T, K]."""
    found_TK = match.found_TK
    plan = cache.policy.plan(cache.step, _view(part, mine, match, cache))
    assert plan.refresh_TK.shape == found_TK.shape
    reason_TK = torch.full_like(found_TK, Reason.SERVED, dtype=torch.uint8)
    reason_TK.masked_fill_(plan.refresh_TK, Reason.SCORE)
    if plan.forced_TK is not None:
        reason_TK.masked_fill_(plan.forced_TK, Reason.FORCED)
    return reason_TK.masked_fill_(~found_TK, Reason.UNMATCHED)


def count_reasons(plan: "LayerPlan", cache: BlockStep, num_experts: int) -> None:
    """Enter a layer's branches into the statistics, without a host synchronisation."""
    reason = torch.cat([decision.reason_TK for decision in plan.decisions]) if plan.decisions else Reason.FULL
    cache.statistics.count_branches(cache.step, cache.block, plan.routing.expert_ids_TK, reason, num_experts)


def fresh_parts(plan: LayerPlan, rows_RD: Tensor, branch_N: Tensor, row_N: Tensor) -> list[FreshRows]:
    """What was computed for each segment; ``branch_N`` among all branches, ascending, so that segments lie in order."""
    k, start, found = plan.routing.num_experts_per_tok, 0, []
    for part, decision in zip(plan.parts, plan.decisions, strict=True):
        window = slice(start, start + decision.num_refreshed)
        mine_N = branch_N[window] - part.tokens.start * k
        found.append(FreshRows(rows_RD, mine_N, row_N[window]))
        start += decision.num_refreshed
    return found


def serve(plan: LayerPlan, fresh: Sequence[FreshRows], cache: BlockStep) -> Tensor:
    """[T, D] routed sums of all segments, from what was computed and what is kept; keeps what was computed."""
    totals = []
    for part, decision, mine in zip(plan.parts, plan.decisions, fresh, strict=True):
        routing = part.routing(plan.routing)
        gates_TK = cache.policy.reference_gates(routing)
        branches = part.kept.branches
        totals.append(branches.serve(routing, decision.match, decision.refresh_TK, mine, cache.step.index, gates_TK))
    return torch.cat(totals)


def _view(part: Part, routing: Routing, match: Match, cache: BlockStep) -> LayerView:
    tokens = part.tokens_per_image
    positions_T = torch.arange(tokens, device=match.found_TK.device).repeat(cache.image_ids_B.shape[0])
    image_ids_T = cache.image_ids_B.repeat_interleave(tokens)
    usage = part.kept.usage
    return LayerView(
        cache.block,
        part.segment.half,
        routing,
        match,
        image_ids_T,
        positions_T,
        part.num_images,
        part.kept.branches.reference(match),
        None if usage is None else usage.usage_BTE,
    )

"""One MoE layer in a cache step, segment by segment: what is refreshed, what is served, what is stored.

Shape suffixes: T tokens (of a segment in ``Part``, of all in a routing), K routed experts per token, D hidden size,
N refreshed branches.
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
from moeca_dist.types import Routing, StepContext, positions


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
    """``served_TD``: the weighted sum of the branches that are not refreshed, zero where all are.

    None in placement ``owner``, where the sums are made beside the experts. ``reason_TK``: uint8, a ``Reason`` for
    every branch. ``num_refreshed`` counts ``refresh_TK``; not in placement ``owner``, where no shape depends on it.
    """

    match: Match
    refresh_TK: Tensor
    reason_TK: Tensor
    served_TD: Tensor | None = None
    num_refreshed: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does in one step; decided before anything is computed. No decisions where all segments are full.

    In exchange mode ``planned`` the ``routing`` of served segments is one step old and ``current`` is what the router
    chooses now; ``traffic`` is what all ranks send, where they have agreed on it already.
    """

    routing: Routing
    parts: Sequence[Part]
    decisions: Sequence[Decision]
    current: Routing | None = None
    traffic: Tensor | None = None

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


def decide(part: Part, routing: Routing, cache: BlockStep) -> Decision:
    """Ask the policy about a segment's branches, and sum up those that this rank's cache serves."""
    mine, kept = part.routing(routing), part.kept
    observe(part, mine)
    match = (kept.branches if cache.owned is None else kept.home).match(mine.expert_ids_TK)
    if part.segment.full:
        return computed(part, match, at_home=cache.owned is None)
    reason_TK = choose(part, mine, match, cache.step, cache)
    if cache.owned is not None:
        return Decision(match, reason_TK != Reason.SERVED, reason_TK)
    return served(part, mine, match, reason_TK, cache)


def computed(part: Part, match: Match, *, at_home: bool = True) -> Decision:
    """All branches of a full segment."""
    refresh_TK = torch.ones_like(match.found_TK)
    reason_TK = torch.full_like(refresh_TK, Reason.FULL, dtype=torch.uint8)
    if not at_home:
        return Decision(match, refresh_TK, reason_TK)
    nothing_TD = part.kept.branches.nothing(refresh_TK.shape[0])
    return Decision(match, refresh_TK, reason_TK, nothing_TD, refresh_TK.numel())


def served(
    part: Part, mine: Routing, match: Match, reason_TK: Tensor, cache: BlockStep, num_refreshed: int | None = None
) -> Decision:
    """The branches of a segment in a cache step, kept at home; ``num_refreshed`` where the host knows it already."""
    refresh_TK = reason_TK != Reason.SERVED
    if num_refreshed is None:
        # NOTE: a host synchronisation on CUDA: the number of refreshed branches decides the shapes.
        num_refreshed = int(refresh_TK.sum())
    served_TD = part.kept.branches.weighted_sum(mine.gates_TK, ~refresh_TK, match, cache.step.index)
    return Decision(match, refresh_TK, reason_TK, served_TD, num_refreshed)


def choose(part: Part, mine: Routing, match: Match, step: StepContext, cache: BlockStep) -> Tensor:
    """uint8 [T, K]: which branches of a segment the policy refreshes in ``step``, this one or the next, and why."""
    found_TK = match.found_TK
    plan = cache.policy.plan(step, _view(part, mine, match, cache))
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


def store_fresh(plan: LayerPlan, branch_N: Tensor, fresh_ND: Tensor, cache: BlockStep) -> None:
    """Write what was refreshed (``branch_N`` among all branches) back to the segments' caches, which lie in order."""
    k, start = plan.routing.num_experts_per_tok, 0
    for part, decision in zip(plan.parts, plan.decisions, strict=True):
        window = slice(start, start + decision.num_refreshed)
        mine, routing = branch_N[window] - part.tokens.start * k, part.routing(plan.routing)
        gates_TK = cache.policy.reference_gates(routing)
        part.kept.branches.store(
            mine // k,
            decision.match.entry_TK.flatten()[mine],
            decision.match.found_TK.flatten()[mine],
            routing.expert_ids_TK.flatten()[mine],
            fresh_ND[window],
            cache.step.index,
            None if gates_TK is None else gates_TK.flatten()[mine],
        )
        part.kept.branches.touch(decision.match, cache.step.index)
        start += decision.num_refreshed


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

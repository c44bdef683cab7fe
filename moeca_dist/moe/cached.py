"""One MoE layer in a cache step, segment by segment: what is refreshed, what is served, what is stored.

Shape suffixes: T tokens (of a segment in ``Part``, of all in a routing), K routed experts per token, D hidden size,
N refreshed branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.branches import Match
from moeca_dist.cache.policy import LayerView
from moeca_dist.cache.rows import Rows
from moeca_dist.cache.session import BlockStep, Segment, SegmentCache
from moeca_dist.cache.statistics import Reason
from moeca_dist.types import Branches, Routing


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

    None in placement ``owner``, where the sums are made beside the experts. ``reason_TK`` holds a ``Reason`` for every
    branch.
    """

    match: Match
    refresh_TK: Tensor
    reason_TK: Tensor
    served_TD: Tensor | None


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does in one step; decided before anything is computed. No decisions where all segments are full."""

    routing: Routing
    parts: Sequence[Part]
    decisions: Sequence[Decision]

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
    refresh_TK, reason_TK = _choose(part, mine, match, cache)
    if cache.owned is not None:
        return Decision(match, refresh_TK, reason_TK, None)
    if part.segment.full:
        return Decision(match, refresh_TK, reason_TK, kept.branches.nothing(mine.num_tokens))
    served_TD = kept.branches.weighted_sum(mine.gates_TK, ~refresh_TK, match, cache.step.index)
    return Decision(match, refresh_TK, reason_TK, served_TD)


def _choose(part: Part, mine: Routing, match: Match, cache: BlockStep) -> tuple[Tensor, Tensor]:
    """[T, K] twice: which branches of a segment are refreshed, and why each is or is not."""
    found_TK = match.found_TK
    if part.segment.full:
        return torch.ones_like(found_TK), torch.full_like(mine.expert_ids_TK, Reason.FULL)
    plan = cache.policy.plan(cache.step, _view(part, mine, match, cache))
    assert plan.refresh_TK.shape == found_TK.shape
    reason_TK = torch.full_like(mine.expert_ids_TK, Reason.SERVED).masked_fill_(plan.refresh_TK, Reason.SCORE)
    if plan.forced_TK is not None:
        reason_TK.masked_fill_(plan.forced_TK, Reason.FORCED)
    return plan.refresh_TK, reason_TK.masked_fill_(~found_TK, Reason.UNMATCHED)


def store_fresh(plan: LayerPlan, branches: Branches, fresh_ND: Tensor, cache: BlockStep) -> None:
    """Write what was refreshed back to the segments' caches; branches are ordered by token, so by segment."""
    start = 0
    for part, decision in zip(plan.parts, plan.decisions, strict=True):
        fresh_TK = decision.refresh_TK
        gates_TK = cache.policy.reference_gates(part.routing(plan.routing))
        count = int(fresh_TK.sum())
        window = slice(start, start + count)
        part.kept.branches.store(
            branches.token_N[window] - part.tokens.start,
            decision.match.entry_TK[fresh_TK],
            decision.match.found_TK[fresh_TK],
            branches.expert_ids_N[window],
            fresh_ND[window],
            cache.step.index,
            None if gates_TK is None else gates_TK[fresh_TK],
        )
        part.kept.branches.touch(decision.match, cache.step.index)
        start += count


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

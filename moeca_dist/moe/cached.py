"""One MoE layer in a cache step, segment by segment: what is refreshed, what is served, what is stored.

Shape suffixes: T tokens (of a segment in ``Part``, of all in a routing), K routed experts per token, D hidden size,
N refreshed branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.branches import BranchCache, EntryTable, Match
from moeca_dist.cache.policy import LayerView
from moeca_dist.cache.session import BlockStep, Segment
from moeca_dist.types import Branches, Routing


@dataclass(frozen=True)
class Part:
    """One segment's tokens among all of the rank's, and its branch cache."""

    segment: Segment
    tokens: slice
    tokens_per_image: int
    branches: BranchCache

    def routing(self, whole: Routing) -> Routing:
        return Routing(whole.expert_ids_TK[self.tokens], whole.gates_TK[self.tokens])


@dataclass(frozen=True)
class Decision:
    """``served_TD``: the weighted sum of the branches that are not refreshed; zero where all are."""

    match: Match
    refresh_TK: Tensor
    served_TD: Tensor


def segment_parts(x_TD: Tensor, cache: BlockStep) -> list[Part]:
    """The segments of the step as token ranges; every image has the same number of tokens."""
    num_images = cache.segments[-1].images.stop
    per_image = x_TD.shape[0] // num_images if num_images else 0
    return [
        Part(
            segment,
            slice(segment.images.start * per_image, segment.images.stop * per_image),
            per_image,
            kept.branches,
        )
        for segment, kept in zip(cache.segments, cache.caches, strict=True)
    ]


def decide(part: Part, routing: Routing, cache: BlockStep) -> Decision:
    """Ask the policy about a segment's branches and sum up those that the cache serves."""
    mine = part.routing(routing)
    match, refresh_TK = choose(part, part.branches, mine, cache)
    if part.segment.full:
        return Decision(match, refresh_TK, part.branches.nothing(mine.num_tokens))
    served_TD = part.branches.weighted_sum(mine.gates_TK, ~refresh_TK, match, cache.step.index)
    return Decision(match, refresh_TK, served_TD)


def choose(part: Part, entries: EntryTable, mine: Routing, cache: BlockStep) -> tuple[Match, Tensor]:
    """Where a segment's branches are stored and which are refreshed, as [T, K]; counted in the statistics."""
    match = entries.match(mine.expert_ids_TK)
    statistics = cache.statistics
    if part.segment.full:
        statistics.full[cache.key] += mine.expert_ids_TK.numel()
        return match, torch.ones_like(match.found_TK)
    plan = cache.policy.plan(cache.step, _view(part, mine, match, cache))
    assert plan.refresh_TK.shape == match.found_TK.shape
    unmatched, refreshed = int((~match.found_TK).sum()), int(plan.refresh_TK.sum())
    statistics.unmatched[cache.key] += unmatched
    statistics.chosen[cache.key] += refreshed - unmatched
    statistics.served[cache.key] += match.found_TK.numel() - refreshed
    return match, plan.refresh_TK


def store_fresh(
    parts: Sequence[Part],
    decisions: Sequence[Decision],
    branches: Branches,
    branch_N: Tensor,
    fresh_ND: Tensor,
    cache: BlockStep,
) -> None:
    """Write what was refreshed back to the segments' caches; branches are ordered by token, so by segment."""
    start = 0
    for part, decision in zip(parts, decisions, strict=True):
        kept_TK = decision.refresh_TK
        count = int(kept_TK.sum())
        window = slice(start, start + count)
        part.branches.store(
            branches.token_N[window] - part.tokens.start,
            decision.match.entry_TK[kept_TK],
            decision.match.found_TK[kept_TK],
            branches.expert_ids_N[window],
            fresh_ND[window],
            cache.step.index,
        )
        part.branches.touch(decision.match, cache.step.index)
        start += count


def _view(part: Part, routing: Routing, match: Match, cache: BlockStep) -> LayerView:
    tokens = part.tokens_per_image
    positions_T = torch.arange(tokens, device=match.found_TK.device).repeat(cache.image_ids_B.shape[0])
    image_ids_T = cache.image_ids_B.repeat_interleave(tokens)
    return LayerView(cache.block, part.segment.half, routing, match, image_ids_T, positions_T)

"""Decisions made one step ahead, which exchange mode ``planned`` needs.

In every step a MoE layer carries out what the step before decided, routes, and decides for the next one. So all layers'
counts are known before a step begins, and the ranks agree on them together.

Shape suffixes: T tokens of one segment, K routed experts per token, L MoE blocks, P ranks of the group, S segments,
C counts of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_dist.cache.branches import Match
from moeca_dist.cache.statistics import Reason


@dataclass(frozen=True)
class SegmentPlan:
    """One block and segment in the next step: its experts, where their branches are, and which are computed.

    ``reason_TK``: uint8, a ``Reason`` for every branch.
    """

    expert_ids_TK: Tensor
    match: Match
    reason_TK: Tensor

    @property
    def refresh_TK(self) -> Tensor:
        return self.reason_TK != Reason.SERVED

    @property
    def num_bytes(self) -> int:
        held = (self.expert_ids_TK, self.match.entry_TK, self.match.found_TK, self.reason_TK)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(frozen=True)
class BlockPlan:
    """One block's decisions, None for segments that are full; ``counts_C`` is None where any is.

    ``counts_C``: what the exchange has to know of the refreshed branches, then how many each segment has of them. It
    stays on the device until the ranks agree.
    """

    segments: tuple[SegmentPlan | None, ...]
    counts_C: Tensor | None


@dataclass
class StepPlans:
    """The plans of all blocks for one step, and what the ranks' counts of it are, gathered once for all blocks."""

    blocks: dict[int, BlockPlan] = field(default_factory=dict)
    _gathered: dict[int, Tensor] | None = None

    def agreed(self, block: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Every rank's counts [P, C] of a block, on the host.

        ``gather``: counts [L, C] -> [P, L, C], a collective and the step's host synchronisation; asked by whichever
        block comes first. Only for steps without full segments.
        """
        if self._gathered is None:
            counts = [plan.counts_C for plan in self.blocks.values() if plan.counts_C is not None]
            assert len(counts) == len(self.blocks)
            self._gathered = dict(zip(self.blocks, gather(torch.stack(counts)).unbind(1), strict=True))
        return self._gathered[block]

    @property
    def num_bytes(self) -> int:
        return sum(plan.num_bytes for block in self.blocks.values() for plan in block.segments if plan is not None)


@dataclass(frozen=True)
class Ahead:
    """The plans for this step, and those that it makes for the next."""

    now: StepPlans
    next: StepPlans

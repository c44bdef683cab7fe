"""Counters of what the cache did in one run on this rank, and of the bytes sent in each step.

Shape suffixes: S steps, Y reasons, E experts, N branches.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from moeca_dist.types import StepContext


class Reason(IntEnum):
    """The reason why a branch is computed, or ``SERVED``. The first reason that holds counts, in this order."""

    FULL = 0  # a full step computes everything
    UNMATCHED = 1  # the cache holds nothing of it
    FORCED = 2  # a rule of the policy computes it without judging it
    SCORE = 3  # the policy judged this very branch, by a score or (the control) by a draw
    SERVED = 4  # reused or forecast


REFRESHED = tuple(reason for reason in Reason if reason < Reason.SERVED)


@dataclass
class CacheStatistics:
    """Counters of a run. Steps and blocks are indices of denoising steps and of MoE blocks.

    - ``modules[name]``: tokens for which a module (``attention``, ``dense``, ``shared``, ``router``, ``moe``) was
      computed, summed over blocks and steps.
    - ``rows[name]``: those of these tokens that were computed one by one in a step that serves the others.
    - ``skipped``: evaluations of an image in which no block ran.
    - ``signals``: times that the time alone was embedded to decide whether to skip.
    - ``reached``: times that the threshold was reached after the first step.
    """

    modules: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    signals: int = 0
    reached: int = 0
    branches: dict[int, Tensor] = field(default_factory=dict)
    """Branches of each step, reason and expert by MoE block: int64 [S, Y, E].

    They are on the model's device, because counting must not stall it.
    """
    bytes_per_step: Counter[int] = field(default_factory=Counter)
    bytes_peak: int = 0

    def note_bytes(self, step: int, sent_so_far: int) -> None:
        """Charge ``step`` with the bytes that this rank has sent and that no earlier step was charged with.

        Args:
            sent_so_far: bytes that this rank has sent in the whole run until now.
        """
        self.bytes_per_step[step] += sent_so_far - self.bytes_per_step.total()

    def count_branches(
        self, step: StepContext, block: int, expert_N: Tensor, reason: Tensor | Reason, num_experts: int
    ) -> None:
        """Count branches by expert.

        Args:
            reason: int64 [N] with one reason per branch, or one reason for all of them.
        """
        if block not in self.branches:
            shape = (step.num_steps, len(Reason), num_experts)
            self.branches[block] = torch.zeros(shape, dtype=torch.int64, device=expert_N.device)
        cell_N = reason * num_experts + expert_N
        self.branches[block][step.index].view(-1).index_add_(0, cell_N, torch.ones_like(cell_N))

    def per_step(self, reason: Reason) -> Counter[tuple[int, int]]:
        """Return the number of branches with ``reason`` by (step, block)."""
        return Counter(
            {
                (step, block): count
                for block, counts_SYE in self.branches.items()
                for step, count in enumerate(counts_SYE[:, reason].sum(-1).tolist())
                if count
            }
        )

    def total(self, reason: Reason) -> int:
        return self.per_step(reason).total()

    def merge(self, other: "CacheStatistics") -> None:
        """Add the counters of another rank. Peaks add up too, because ranks hold their caches at the same time."""
        for name in ("modules", "rows", "bytes_per_step"):
            getattr(self, name).update(getattr(other, name))
        self.skipped += other.skipped
        self.signals += other.signals
        self.reached += other.reached
        for block, counts_SYE in other.branches.items():
            mine_SYE = self.branches.get(block)
            self.branches[block] = counts_SYE.cpu() if mine_SYE is None else mine_SYE + counts_SYE.cpu()
        self.bytes_peak += other.bytes_peak

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with tensors on the CPU: other ranks may not have this rank's device."""
        return self.__dict__ | {"branches": {block: counts.cpu() for block, counts in self.branches.items()}}

"""What the cache did in one run on this rank, and what was sent meanwhile, counted where it happens.

Shape suffixes: N branches, E experts.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class CacheStatistics:
    """Counters of a run; steps and layers are indices of denoising steps and of MoE blocks.

    ``modules[name]``: tokens for which a module (``attention``, ``dense``, ``shared``, ``router``, ``moe``) was
    computed, summed over blocks and steps. The branch counters are keyed by (step, block). ``skipped`` counts
    evaluations of an image in which no block ran, ``signals`` how often the time alone was embedded to decide that,
    ``reached`` how often the threshold was reached after the first step.
    """

    modules: Counter[str] = field(default_factory=Counter)
    full: Counter[tuple[int, int]] = field(default_factory=Counter)
    unmatched: Counter[tuple[int, int]] = field(default_factory=Counter)
    chosen: Counter[tuple[int, int]] = field(default_factory=Counter)
    served: Counter[tuple[int, int]] = field(default_factory=Counter)
    skipped: int = 0
    signals: int = 0
    reached: int = 0
    experts: dict[int, Tensor] = field(default_factory=dict)
    """By block: branches computed for each expert, int64 [E]; on the model's device, which counting must not stall."""
    bytes_per_step: Counter[int] = field(default_factory=Counter)
    bytes_peak: int = 0

    def note_bytes(self, step: int, sent_so_far: int) -> None:
        """Count for ``step`` what this rank has sent in the run and no step has been charged with."""
        self.bytes_per_step[step] += sent_so_far - self.bytes_per_step.total()

    def count_experts(self, block: int, expert_ids: Tensor, num_experts: int) -> None:
        """Count computed branches (int64 global ids of any shape) for their experts."""
        ids_N = expert_ids.flatten()
        if block not in self.experts:
            self.experts[block] = torch.zeros(num_experts, dtype=torch.int64, device=ids_N.device)
        self.experts[block].index_add_(0, ids_N, torch.ones_like(ids_N))

    def merge(self, other: "CacheStatistics") -> None:
        """Add what another rank counted; peaks add up too, because ranks hold their caches at the same time."""
        for name in ("modules", "full", "unmatched", "chosen", "served", "bytes_per_step"):
            getattr(self, name).update(getattr(other, name))
        self.skipped += other.skipped
        self.signals += other.signals
        self.reached += other.reached
        for block, counts_E in other.experts.items():
            self.experts[block] = self.experts[block] + counts_E.cpu() if block in self.experts else counts_E.cpu()
        self.bytes_peak += other.bytes_peak

    def __getstate__(self) -> dict[str, Any]:
        """What travels to other ranks: they may not have this rank's device."""
        return self.__dict__ | {"experts": {block: counts_E.cpu() for block, counts_E in self.experts.items()}}

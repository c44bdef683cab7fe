"""What the cache did in one run on this rank, counted where it happens."""

from collections import Counter
from dataclasses import dataclass, field


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
    bytes_peak: int = 0

    def merge(self, other: "CacheStatistics") -> None:
        """Add what another rank counted; peaks add up too, because ranks hold their caches at the same time."""
        for name in ("modules", "full", "unmatched", "chosen", "served"):
            getattr(self, name).update(getattr(other, name))
        self.skipped += other.skipped
        self.signals += other.signals
        self.reached += other.reached
        self.bytes_peak += other.bytes_peak

"""TeaCache (arXiv 2411.19108): the whole network is skipped while its input has changed little.

The relative L1 change of the timestep-modulated input of the first block is accumulated from step to step. The blocks
are skipped until the sum reaches ``delta``. A skipped step adds their last total change to the current input.

Adaptation: the ranks of an expert-parallel group must skip together, and no image may depend on its batch. So the
change is that of the first block's modulation (shift and scale). The modulation is made from the timestep alone,
without image and label. It is the same in both guidance halves and on all ranks. The published polynomial that rescales
the change is fitted for each model and left out. ``delta`` is in units of the raw change.
"""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policy import Half, NetworkPolicy
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

OPTIONS = frozenset({"delta"})
DEFAULT_DELTA = 0.1


@dataclass(frozen=True, kw_only=True)
class TeaCache(NetworkPolicy):
    name: ClassVar[str] = "teacache"

    def is_full(self, step: StepContext, half: Half) -> bool:
        """Return True: a step that is not skipped computes everything."""
        return True

    def remark(self, statistics: CacheStatistics) -> str | None:
        if statistics.signals and not statistics.skipped and self.delta:
            return f"cache.delta {self.delta} never skipped a step: every step changes the modulation by more"
        if statistics.skipped and not statistics.reached:
            return f"cache.delta {self.delta} skipped every step but the first: the modulation never changed so much"
        return None


def build(config: CacheConfig, num_steps: int, guided: bool) -> TeaCache:
    return TeaCache(delta=DEFAULT_DELTA if config.delta is None else config.delta)

"""The network cache: what all blocks together add to their input, kept between steps.

A schedule or TeaCache's signal decides which steps run the blocks.

Shape suffixes: B images of the network's batch, T tokens of one image, D hidden size, S signal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.cache.module_cache import ModuleCache
from moeca_dist.cache.policy import Half, NetworkPolicy
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import AS_COMPUTED, Storage
from moeca_dist.timing import Timer
from moeca_dist.types import StepContext


class NetworkCache:
    """The change from the first block's input to the last block's output, one for each guidance half."""

    def __init__(
        self, policy: NetworkPolicy, num_images: int, halves: Sequence[Half], storage: Storage = AS_COMPUTED
    ) -> None:
        """Make an empty cache.

        Args:
            num_images: of each half.
        """
        self.policy = policy
        self.halves = halves
        self.slices = [slice(index * num_images, (index + 1) * num_images) for index in range(len(halves))]
        self.changes = [ModuleCache(policy.order, storage) for _ in halves]
        self._signal_S: Tensor | None = None
        self._accumulated = 0.0

    def add_signal(self, signal_S: Tensor) -> bool:
        """Add the signal's relative L1 change since the last step to a sum.

        The first signal is always due (TeaCache, arXiv 2411.19108, section 3.3).

        Returns:
            Whether the sum has reached ``delta``. If so, it starts anew.
        """
        assert self.policy.delta is not None
        before_S, self._signal_S = self._signal_S, signal_S
        if before_S is not None:
            # NOTE: one host synchronisation per step on CUDA.
            self._accumulated += ((signal_S - before_S).abs().mean() / before_S.abs().mean()).item()
            if self._accumulated < self.policy.delta:
                return False
        self._accumulated = 0.0
        return True

    @property
    def num_bytes(self) -> int:
        return sum(change.num_bytes for change in self.changes)


@dataclass(frozen=True)
class NetworkStep:
    """The network's cache in one evaluation. Which halves are computed is the same on all ranks."""

    step: StepContext
    cache: NetworkCache
    statistics: CacheStatistics
    timer: Timer

    @property
    def needs_signal(self) -> bool:
        """Return whether ``due`` wants the modulation of the time alone."""
        return self.cache.policy.delta is not None

    def due(self, signal_S: Tensor | None) -> list[bool]:
        """Return for each half whether its blocks run now. Asked once in every step."""
        if signal_S is None:
            return [self.cache.policy.is_full(self.step, half) for half in self.cache.halves]
        is_due = self.cache.add_signal(signal_S)
        self.statistics.signals += 1
        self.statistics.reached += is_due and self.step.index > 0
        return [is_due] * len(self.cache.halves)

    def images(self, due: Sequence[bool]) -> slice:
        """Return the images of the halves that are due.

        At least one half is, and their images lie next to each other.
        """
        computed = [images for images, is_due in zip(self.cache.slices, due, strict=True) if is_due]
        return slice(computed[0].start, computed[-1].stop)

    def store(self, due: Sequence[bool], x_BTD: Tensor, computed_BTD: Tensor) -> None:
        """Keep what the blocks added to ``x_BTD``.

        Args:
            computed_BTD: output of the blocks for ``images(due)``.
        """
        with self.timer.section("bookkeeping"):
            first = self.images(due).start
            for images, change, is_due in zip(self.cache.slices, self.cache.changes, due, strict=True):
                if is_due:
                    here = slice(images.start - first, images.stop - first)
                    change.store(computed_BTD[here] - x_BTD[images], self.step.index)

    def expected(self, due: Sequence[bool], x_BTD: Tensor) -> Tensor:
        """Return the blocks' expected output [B, T, D] for the halves that are not due.

        The other rows are arbitrary.
        """
        with self.timer.section("bookkeeping"):
            out_BTD = torch.empty_like(x_BTD)
            for images, change, is_due in zip(self.cache.slices, self.cache.changes, due, strict=True):
                if not is_due:
                    change.forecast(self.step.index).sum(out=out_BTD[images])
                    out_BTD[images] += x_BTD[images]
                    self.statistics.skipped += images.stop - images.start
            return out_BTD

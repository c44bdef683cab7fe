"""A guard over forecasts of the whole network: where a full step finds them wrong, the next gap is computed densely.

A full step knows what the forecast would have been, so its error costs no evaluation. Each image is judged by itself,
against limits measured on other images when the cache was calibrated (``sampling/ranges.py``). Out of range, the gap to
the next full step is divided into so many pieces that the error is expected in range again: a forecast of order o is
wrong by about the (o + 1)-th power of how far it reaches. It is the step-size controller of adaptive ODE solvers
(Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4), and widens gaps again too, up to
those of the schedule.

An image's full evaluations follow from its own errors, so it stays independent of its batch and of the number of ranks.
Ranks agree only on whether any of them computes in an added step.

Shape suffixes: B images of one guidance half, T tokens of one image, D hidden size, C steps that may be added.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.rows import RowCache
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.types import StepContext

Limits = Mapping[Half, Mapping[int, float]]
"""By guidance half and full step: the largest relative error that is in range."""
Agree = Callable[[Tensor], Tensor]
"""int64 counts [C] of this rank -> their sums over the expert-parallel group, on the host."""


class Watch(Protocol):
    """Sees the errors of a batch's forecasts, and may have images computed in steps that would serve them."""

    def full_step(self, step: StepContext, errors: Mapping[Half, Tensor]) -> None:
        """Relative errors [B] of the halves that ``step`` computed; not asked where none had been stored before."""
        ...

    def added(self, step: StepContext, half: Half) -> Sequence[int] | None:
        """This rank's images, ascending, to compute in a step that serves the half; None where no rank has any."""
        ...


class ErrorRecord:
    """Keeps all errors and changes nothing: for calibration. ``errors``: by half and step, [B]."""

    def __init__(self) -> None:
        self.errors: dict[tuple[Half, int], Tensor] = {}

    def full_step(self, step: StepContext, errors: Mapping[Half, Tensor]) -> None:
        self.errors |= {(half, step.index): error_B for half, error_B in errors.items()}

    def added(self, step: StepContext, half: Half) -> Sequence[int] | None:
        return None


@dataclass(frozen=True)
class Gap:
    """Between two full steps of a half, or the last one and the end; ``before``: the full step before ``start``."""

    half: Half
    before: int
    start: int
    stop: int

    def divided(self, pieces: int) -> list[int]:
        """The steps that divide it evenly."""
        return [self.start + round(piece * (self.stop - self.start) / pieces) for piece in range(1, pieces)]


def gaps_of(policy: Policy, num_steps: int, half: Half) -> dict[int, Gap]:
    """By full step: the gap that follows it. Without step 0, before which there is nothing to forecast from."""
    full = [index for index in range(num_steps) if policy.is_full(StepContext(index, num_steps, 0.0), half)]
    return {
        start: Gap(half, before, start, stop)
        for before, start, stop in zip(full, full[1:], [*full[2:], num_steps], strict=False)
    }


def has_forecast(policy: Policy | None) -> bool:
    """Whether a policy forecasts the whole network between full steps that are known beforehand."""
    return policy is not None and policy.unit == "network" and policy.delta is None


class Guard:
    """The guard of one batch of ``num_images`` on this rank."""

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        num_steps: int,
        num_images: int,
        statistics: CacheStatistics,
        agree: Agree = lambda counts_C: counts_C,
    ) -> None:
        self._limits = limits
        self._gaps = {half: gaps_of(policy, num_steps, half) for half in limits}
        self._order = policy.order
        self._statistics = statistics
        self._agree = agree
        # What was added for each image since the last full step of the schedule.
        self._since: dict[Half, list[list[int]]] = {half: [[] for _ in range(num_images)] for half in limits}
        # The last full step, and the images whose gap before it was divided.
        self._ended: dict[Half, tuple[int, set[int]]] = {}
        self._added: dict[tuple[Half, int], list[int]] = {}
        self._tightened: set[int] = set()

    def full_step(self, step: StepContext, errors: Mapping[Half, Tensor]) -> None:
        gaps = [self._gaps[half][step.index] for half in errors]
        # NOTE: a host synchronisation on CUDA, once per full step: which evaluations there are follows from the errors.
        values = torch.stack(list(errors.values())).tolist()
        wanted = [self._divided(gap, errors_B) for gap, errors_B in zip(gaps, values, strict=True)]
        # Of every step in the gaps, so that all ranks agree about the same ones.
        within = [
            (gap.half, index, images.get(index, []))
            for gap, images in zip(gaps, wanted, strict=True)
            for index in range(gap.start + 1, gap.stop)
        ]
        if not within:
            return
        counts_C = torch.tensor([len(images) for *_, images in within], dtype=torch.int64)
        for (half, index, images), count in zip(within, self._agree(counts_C).tolist(), strict=True):
            if count:
                self._added[half, index] = images

    def added(self, step: StepContext, half: Half) -> Sequence[int] | None:
        return self._added.get((half, step.index))

    def off_schedule(self, step: StepContext) -> list[int]:
        """Images, ascending, for which a gap is divided: from its first added step to the full step at its end."""
        ongoing = {
            image
            for since in self._since.values()
            for image, added in enumerate(since)
            if added and added[0] <= step.index
        }
        return sorted(ongoing.union(*(images for index, images in self._ended.values() if index == step.index)))

    def _divided(self, gap: Gap, errors_B: Sequence[float]) -> dict[int, list[int]]:
        """This rank's images by the step that is added for them."""
        statistics, limit, since = self._statistics, self._limits[gap.half][gap.start], self._since[gap.half]
        self._ended[gap.half] = gap.start, {image for image, added in enumerate(since) if added}
        wanted: dict[int, list[int]] = {}
        for image, error in enumerate(errors_B):
            # In range is judged as if the forecast had reached over the whole gap.
            stretch = (gap.start - gap.before) / (gap.start - max([gap.before, *since[image]]))
            since[image] = gap.divided(self._pieces(stretch, error / limit, gap.stop - gap.start))
            for index in since[image]:
                wanted.setdefault(index, []).append(image)
            statistics.guard_measured += 1
            statistics.guard_fired[gap.half, gap.start] += not error <= limit
            if since[image] and image not in self._tightened:
                self._tightened.add(image)
                statistics.guard_images += 1
        for index, images in wanted.items():
            statistics.guard_added[gap.half, index] += len(images)
        return wanted

    def _pieces(self, stretch: float, ratio: float, length: int) -> int:
        if not math.isfinite(ratio):
            return length
        return max(1, min(length, math.ceil(stretch * ratio ** (1 / (self._order + 1)))))


def relative_error(forecast: RowCache, computed_BTD: Tensor, step: int) -> Tensor:
    """By how much the forecast for ``step`` would have been wrong, over what was computed: norms, float32 [B]."""
    expected_BTD = torch.empty_like(computed_BTD)
    forecast.forecast_into(expected_BTD, step)
    off_B = (expected_BTD - computed_BTD).float().flatten(1).norm(dim=1)
    return off_B / computed_BTD.float().flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)

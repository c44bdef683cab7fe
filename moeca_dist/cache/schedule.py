"""The positions of the full steps of a request, for each guidance half."""

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_dist.cache.policy import Half
from moeca_dist.config import HalvesConfig
from moeca_dist.errors import UserError
from moeca_dist.types import StepContext


@dataclass(frozen=True)
class FullSteps:
    """The indices of the full steps of each half. Halves may differ, because guidance weights their errors
    differently.
    """

    conditional: frozenset[int]
    unconditional: frozenset[int]

    @classmethod
    def every(cls, interval: int, num_steps: int) -> "FullSteps":
        """Return the steps 0, N, 2N, ... of both halves."""
        steps = frozenset(range(0, num_steps, interval))
        return cls(steps, steps)

    @classmethod
    def toca(cls, interval: int, num_steps: int) -> "FullSteps":
        """Return ToCa's schedule (arXiv 2410.05317).

        Two full steps are ``round(N / (1.4 - 0.8 * s / T))`` apart. The distance is 2 for s in [0.2 T, 0.4 T). Here s
        is the number of steps that are left and T the number of all steps. So full steps grow denser towards the image.
        """
        steps, last = {0}, 0
        for index in range(1, num_steps):
            part = (num_steps - 1 - index) / num_steps
            gap = 2 if 0.2 <= part < 0.4 else round(interval / (1.4 - 0.8 * part))
            if index - last >= gap:
                steps.add(index)
                last = index
        return cls(frozenset(steps), frozenset(steps))

    @classmethod
    def listed(cls, steps: Sequence[int] | HalvesConfig, num_steps: int, *, guided: bool) -> "FullSteps":
        """Return the listed steps: one list for both halves, or one for each.

        Raises UserError for steps outside 0..num_steps-1, and for a list without step 0. Raises it also for two lists
        without guidance, because there is no unconditional half then.
        """
        if isinstance(steps, HalvesConfig):
            if not guided:
                raise UserError("cache.full_steps.unconditional has no effect at sampling.cfg_scale 1: give one list")
            return cls(_checked(steps.conditional, num_steps), _checked(steps.unconditional, num_steps))
        both = _checked(steps, num_steps)
        return cls(both, both)

    def contains(self, step: StepContext, half: Half) -> bool:
        return step.index in (self.conditional if half == "conditional" else self.unconditional)


def _checked(steps: Sequence[int], num_steps: int) -> frozenset[int]:
    strays = [step for step in steps if not 0 <= step < num_steps]
    if strays:
        raise UserError(f"cache.full_steps names {strays[0]}, but the steps are 0..{num_steps - 1}")
    if 0 not in steps:
        raise UserError("cache.full_steps must contain 0: nothing is stored before the first step")
    return frozenset(steps)

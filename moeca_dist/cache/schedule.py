"""Where the full steps of a request sit, for each guidance half."""

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_dist.cache.policy import Half
from moeca_dist.config import HalvesConfig
from moeca_dist.errors import UserError
from moeca_dist.types import StepContext


@dataclass(frozen=True)
class FullSteps:
    """Indices of the full steps; the halves may differ, because guidance weights their errors differently."""

    conditional: frozenset[int]
    unconditional: frozenset[int]

    @classmethod
    def every(cls, interval: int, num_steps: int) -> "FullSteps":
        """Steps 0, N, 2N, ... of both halves."""
        steps = frozenset(range(0, num_steps, interval))
        return cls(steps, steps)

    @classmethod
    def listed(cls, steps: Sequence[int] | HalvesConfig, num_steps: int, *, guided: bool) -> "FullSteps":
        """One list for both halves, or one for each.

        Raises UserError for steps outside 0..num_steps-1, a list without step 0, and two lists where there is no
        guidance and so no unconditional half.
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

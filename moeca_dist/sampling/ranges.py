"""The range that forecast errors of a calibrated run stay in, by guidance half and full step: what a guard goes by.

Errors of one half and step are close to log-normal over images, so a limit lies so many standard deviations of the
logarithm above its mean. Few images tell the spread of one step badly: it counts as at least that of all steps of the
half (root mean square).

Shape suffixes: B images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moeca_dist.cache.policy import Half

# Of some ten thousand normal values none is farther out.
SPREADS = 4.0
MIN_IMAGES = 8


@dataclass(frozen=True)
class ErrorRanges:
    """``typical`` (geometric mean) and ``limits`` of the relative errors; ``num_images`` they were measured on."""

    typical: dict[Half, dict[int, float]]
    limits: dict[Half, dict[int, float]]
    num_images: int

    @classmethod
    def of(cls, errors: Mapping[tuple[Half, int], Tensor]) -> "ErrorRanges | None":
        """From errors [B] by half and step; None for less than ``MIN_IMAGES`` images, no errors, or infinite ones."""
        typical: dict[Half, dict[int, float]] = {}
        limits: dict[Half, dict[int, float]] = {}
        num_images = min((len(error_B) for error_B in errors.values()), default=0)
        if num_images < MIN_IMAGES:
            return None
        for half in dict.fromkeys(half for half, _ in errors):
            logs = {
                step: error_B.double().clamp(min=torch.finfo(torch.float32).tiny).log()
                for (other, step), error_B in errors.items()
                if other == half
            }
            pooled = math.sqrt(fmean(float(log_B.var()) for log_B in logs.values()))
            typical[half] = {step: math.exp(log_B.mean()) for step, log_B in logs.items()}
            limits[half] = {
                step: math.exp(log_B.mean() + SPREADS * max(pooled, float(log_B.std()))) for step, log_B in logs.items()
            }
        if not all(map(math.isfinite, [limit for steps in limits.values() for limit in steps.values()])):
            return None
        return cls(typical, limits, num_images)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "ErrorRanges":
        """What ``dataclasses.asdict`` and JSON made of one; KeyError, TypeError or ValueError for anything else."""
        typical, limits = (
            {half: {int(step): float(value) for step, value in steps.items()} for half, steps in tree[name].items()}
            for name in ("typical", "limits")
        )
        if not all(0 < value < math.inf for steps in limits.values() for value in steps.values()):
            raise ValueError("limits are positive numbers")
        return cls(typical, limits, int(tree["num_images"]))

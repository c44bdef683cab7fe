"""Branch forecast: each routed branch is extrapolated on its own and weighted with the current gate.

In a cache step the router runs. Cached branches are extrapolated from their last two computed values. Unmatched
branches are computed on the forecast attention and shared outputs, unless ``attention_sync`` refreshes these rows too.
Only unmatched branches travel. The full steps are placed freely, for each guidance half on its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, branch_order
from moeca_dist.cache.policy import BranchPolicy
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"order", "attention_sync"}
DEFAULT_ORDER = 1  # a second order was worse
# Eleven of fifty steps, found on the shipped model by
# `benchmarks/search_schedule.py --conditional 0,1,4,11,17,23,28,33,39,43,48 --seconds 480` (20 images of seed 7).
DEFAULT_FRACTIONS = tuple(step / 50 for step in (0, 4, 6, 11, 16, 21, 27, 33, 39, 44, 48))


@dataclass(frozen=True, kw_only=True)
class MoecaForecast(Scheduled, BranchPolicy):
    name: ClassVar[str] = "moeca_forecast"


def scaled_steps(num_steps: int) -> list[int]:
    """Return the default full steps scaled to a number of steps. If some coincide, there are fewer of them."""
    # A sliver above: 0.58 * 50 falls just short of 29.
    return sorted({int(part * num_steps + 1e-6) for part in DEFAULT_FRACTIONS})


def default_or_stated(config: CacheConfig, num_steps: int, guided: bool) -> FullSteps:
    """Return the full steps that the configuration states, else the searched ones."""
    if config.full_steps is not None:
        return FullSteps.listed(config.full_steps, num_steps, guided=guided)
    if config.interval is not None:
        return FullSteps.every(config.interval, num_steps)
    return FullSteps.listed(scaled_steps(num_steps), num_steps, guided=guided)


def build(config: CacheConfig, num_steps: int, guided: bool) -> MoecaForecast:
    return MoecaForecast(
        schedule=default_or_stated(config, num_steps, guided),
        order=branch_order(config, DEFAULT_ORDER),
        attention_sync=bool(config.attention_sync),
    )

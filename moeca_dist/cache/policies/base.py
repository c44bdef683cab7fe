"""The schedule of full steps that most policies share, and its options in the configuration."""

from dataclasses import dataclass

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.config import CacheConfig
from moeca_dist.errors import UserError
from moeca_dist.types import StepContext

SCHEDULE_OPTIONS = frozenset({"interval", "full_steps"})


@dataclass(frozen=True, kw_only=True)
class Scheduled(Policy):
    """A policy whose full steps follow a schedule."""

    schedule: FullSteps

    def is_full(self, step: StepContext, half: Half) -> bool:
        return self.schedule.contains(step, half)

    @property
    def halves_agree(self) -> bool:
        return self.schedule.conditional == self.schedule.unconditional


def schedule_of(config: CacheConfig, num_steps: int, guided: bool, default_interval: int) -> FullSteps:
    """Return the schedule that the configuration states, else a uniform one."""
    if config.full_steps is not None:
        return FullSteps.listed(config.full_steps, num_steps, guided=guided)
    return FullSteps.every(config.interval or default_interval, num_steps)


def branch_order(config: CacheConfig, default: int) -> int:
    """Return the order of a branch forecast.

    Raises UserError above order 1: branches do not keep enough values for it.
    """
    if config.order is not None and config.order > 1:
        raise UserError(f"cache.order {config.order}: policy {config.policy} forecasts branches with order 0 or 1")
    return default if config.order is None else config.order

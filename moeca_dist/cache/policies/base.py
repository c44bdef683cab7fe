"""What the policies share: a schedule of full steps, and the defaults of what most of them do not do."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeca_dist.cache.policy import Half, LayerView, ModuleView, RefreshPlan
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.config import CacheConfig
from moeca_dist.errors import UserError
from moeca_dist.types import Routing, StepContext

SCHEDULE_OPTIONS = frozenset({"interval", "full_steps"})


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """A policy with whole modules or branches that are served as they are stored."""

    order: int = 0
    attention_sync: bool = False
    delta: float | None = None

    usage_decay: ClassVar[float | None] = None
    computes_modules: ClassVar[bool] = False
    refreshes_rows: ClassVar[bool] = False

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        return RefreshPlan(~view.match.found_TK)

    def rows(self, step: StepContext, view: ModuleView) -> Tensor:
        raise NotImplementedError

    def reference_gates(self, routing: Routing) -> Tensor | None:
        return None

    def remark(self, statistics: CacheStatistics) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Scheduled(Defaults):
    """Full steps by a schedule; in between only what is nowhere in the cache is computed."""

    schedule: FullSteps

    def is_full(self, step: StepContext, half: Half) -> bool:
        return self.schedule.contains(step, half)


def schedule_of(config: CacheConfig, num_steps: int, guided: bool, default_interval: int) -> FullSteps:
    """The schedule that the configuration states, else a uniform one."""
    if config.full_steps is not None:
        return FullSteps.listed(config.full_steps, num_steps, guided=guided)
    return FullSteps.every(config.interval or default_interval, num_steps)


def branch_order(config: CacheConfig, default: int) -> int:
    """The order of a branch forecast; UserError above 1, for which branches do not keep enough values."""
    if config.order is not None and config.order > 1:
        raise UserError(f"cache.order {config.order}: policy {config.policy} forecasts branches with order 0 or 1")
    return default if config.order is None else config.order

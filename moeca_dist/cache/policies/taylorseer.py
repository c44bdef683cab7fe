"""TaylorSeer (arXiv 2503.06923): a full step every N, every module's output extrapolated in between."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeca_dist.cache.policies.scheduled import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"order"}
DEFAULT_INTERVAL = 4
DEFAULT_ORDER = 1


@dataclass(frozen=True)
class TaylorSeer(Scheduled):
    order: int

    name: ClassVar[str] = "taylorseer"
    unit: ClassVar[Literal["module", "branch"]] = "module"
    extra_entries: ClassVar[int] = 0


def build(config: CacheConfig, num_steps: int, guided: bool) -> TaylorSeer:
    order = DEFAULT_ORDER if config.order is None else config.order
    return TaylorSeer(schedule_of(config, num_steps, guided, DEFAULT_INTERVAL), order)

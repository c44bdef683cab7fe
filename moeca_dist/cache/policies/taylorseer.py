"""TaylorSeer (arXiv 2503.06923): a full step every N, every module's output extrapolated in between."""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policies.scheduled import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import Unit
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"order"}
DEFAULT_INTERVAL = 4
DEFAULT_ORDER = 1


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Scheduled):
    name: ClassVar[str] = "taylorseer"
    unit: ClassVar[Unit] = "module"


def build(config: CacheConfig, num_steps: int, guided: bool) -> TaylorSeer:
    order = DEFAULT_ORDER if config.order is None else config.order
    return TaylorSeer(schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL), order=order)

"""TaylorSeer (arXiv 2503.06923): a full step every N, every module's output extrapolated in between.

FORA (arXiv 2407.01425) reuses the outputs, which is order 0, and has an interval of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import Unit
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"order"}
DEFAULT_INTERVAL = 4
DEFAULT_ORDER = 1
FORA_OPTIONS = SCHEDULE_OPTIONS
FORA_INTERVAL = 3


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Scheduled):
    name: str
    unit: ClassVar[Unit] = "module"


def build(config: CacheConfig, num_steps: int, guided: bool) -> TaylorSeer:
    order = DEFAULT_ORDER if config.order is None else config.order
    schedule = schedule_of(config, num_steps, guided, DEFAULT_INTERVAL)
    return TaylorSeer(name="taylorseer", schedule=schedule, order=order)


def build_fora(config: CacheConfig, num_steps: int, guided: bool) -> TaylorSeer:
    return TaylorSeer(name="fora", schedule=schedule_of(config, num_steps, guided, FORA_INTERVAL))

"""Module policies: TaylorSeer extrapolates every module's output between full steps, and FORA reuses it.

TaylorSeer is arXiv 2503.06923. FORA is arXiv 2407.01425: the same with order 0 and another interval.
"""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import ModulePolicy
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"order"}
FORA_OPTIONS = SCHEDULE_OPTIONS
DEFAULT_INTERVAL, FORA_INTERVAL = 4, 3
DEFAULT_ORDER = 1


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Scheduled, ModulePolicy):
    """The policy of both methods. ``order`` 0 is FORA."""

    name: ClassVar[str] = "taylorseer"


def build(config: CacheConfig, num_steps: int, guided: bool) -> TaylorSeer:
    order = DEFAULT_ORDER if config.order is None else config.order
    return TaylorSeer(schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL), order=order)


def build_fora(config: CacheConfig, num_steps: int, guided: bool) -> TaylorSeer:
    return TaylorSeer(schedule=schedule_of(config, num_steps, guided, FORA_INTERVAL))

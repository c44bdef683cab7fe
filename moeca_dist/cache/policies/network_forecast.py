"""Whole-network forecast: between full steps no block runs, and the sum of their outputs is extrapolated.

The input of the blocks and the output layer are those of the current step. This is the coarsest forecast: it needs no
router, no exchange, and one cached tensor per guidance half instead of several per block. It follows the cumulative
residual of FreqCa (arXiv 2510.08669). Forecasts of modules and branches have to beat this policy.
"""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled
from moeca_dist.cache.policies.moeca_forecast import default_or_stated
from moeca_dist.cache.policy import NetworkPolicy
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"order"}
DEFAULT_ORDER = 1


@dataclass(frozen=True, kw_only=True)
class NetworkForecast(Scheduled, NetworkPolicy):
    name: ClassVar[str] = "network_forecast"


def build(config: CacheConfig, num_steps: int, guided: bool) -> NetworkForecast:
    order = DEFAULT_ORDER if config.order is None else config.order
    return NetworkForecast(schedule=default_or_stated(config, num_steps, guided), order=order)

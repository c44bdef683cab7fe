"""FORA (arXiv 2407.01425): a full step every N, every module's output reused in between."""

from dataclasses import dataclass
from typing import ClassVar

from moeca_dist.cache.policies.scheduled import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import Unit
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS
DEFAULT_INTERVAL = 3


@dataclass(frozen=True, kw_only=True)
class Fora(Scheduled):
    name: ClassVar[str] = "fora"
    unit: ClassVar[Unit] = "module"


def build(config: CacheConfig, num_steps: int, guided: bool) -> Fora:
    return Fora(schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL))

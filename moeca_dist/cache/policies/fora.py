"""FORA (arXiv 2407.01425): a full step every N, every module's output reused in between."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeca_dist.cache.policies.scheduled import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS
DEFAULT_INTERVAL = 3


@dataclass(frozen=True)
class Fora(Scheduled):
    name: ClassVar[str] = "fora"
    unit: ClassVar[Literal["module", "branch"]] = "module"
    order: ClassVar[int] = 0
    extra_entries: ClassVar[int] = 0


def build(config: CacheConfig, num_steps: int, guided: bool) -> Fora:
    return Fora(schedule_of(config, num_steps, guided, DEFAULT_INTERVAL))

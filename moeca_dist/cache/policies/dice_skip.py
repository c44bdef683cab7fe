"""The conditional skip of DICE (arXiv 2411.16786): every other step a token's branch with the lowest gate is reused.

Everything else is computed in every step. Unlike the published skip, which reuses a slot, the stored output is found by
expert id: a branch that the cache does not hold is computed. Matched outputs get the current gate.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import LayerView, RefreshPlan, Unit
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

OPTIONS = SCHEDULE_OPTIONS
DEFAULT_INTERVAL = 2


@dataclass(frozen=True, kw_only=True)
class DiceSkip(Scheduled):
    name: ClassVar[str] = "dice_skip"
    unit: ClassVar[Unit] = "branch"
    computes_modules: ClassVar[bool] = True

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        lowest_T1 = view.routing.gates_TK.argmin(dim=-1, keepdim=True)
        kept_TK = torch.ones_like(view.match.found_TK).scatter_(1, lowest_T1, False)
        # Only the branch of lowest gate is judged; whatever is not it is computed.
        return RefreshPlan(kept_TK | ~view.match.found_TK, forced_TK=kept_TK)


def build(config: CacheConfig, num_steps: int, guided: bool) -> DiceSkip:
    return DiceSkip(schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL))

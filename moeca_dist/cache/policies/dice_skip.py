"""The conditional skip of DICE (arXiv 2411.16786): every other step reuses a token's branch with the lowest gate.

All other branches are computed in every step. The published skip reuses a slot. Here the stored output is found by
expert id, and a branch that the cache does not hold is computed. A matched output is weighted with the current gate.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import BranchPolicy, LayerView
from moeca_dist.cache.statistics import Reason
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

OPTIONS = SCHEDULE_OPTIONS
DEFAULT_INTERVAL = 2


@dataclass(frozen=True, kw_only=True)
class DiceSkip(Scheduled, BranchPolicy):
    """A policy that computes all branches of a cached step but the one of lowest gate of each token."""

    name: ClassVar[str] = "dice_skip"
    computes_modules: ClassVar[bool] = True
    # Only the branch of lowest gate is judged; whatever is not it is computed.
    reason: ClassVar[Reason] = Reason.FORCED

    def refresh(self, step: StepContext, view: LayerView) -> Tensor:
        routing = view.routing
        lowest_T = torch.full_like(routing.start_T, torch.inf, dtype=routing.gate_N.dtype)
        lowest_T.scatter_reduce_(0, routing.token_N, routing.gate_N, "amin")
        is_lowest_N = routing.gate_N == lowest_T.index_select(0, routing.token_N)
        # Of equal gates the first one is skipped.
        branch_N = torch.arange(is_lowest_N.shape[0], device=is_lowest_N.device)
        first_T = torch.full_like(routing.start_T, is_lowest_N.shape[0])
        first_T.scatter_reduce_(0, routing.token_N, branch_N.masked_fill(~is_lowest_N, branch_N.shape[0]), "amin")
        return branch_N != first_T.index_select(0, routing.token_N)


def build(config: CacheConfig, num_steps: int, guided: bool) -> DiceSkip:
    return DiceSkip(schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL))

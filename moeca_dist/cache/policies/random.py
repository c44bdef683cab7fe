"""The control: besides unmatched branches, a random share of all branches is computed in a cache step."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, branch_order, schedule_of
from moeca_dist.cache.policy import LayerView, RefreshPlan, Unit
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

OPTIONS = SCHEDULE_OPTIONS | {"order", "ratio", "attention_sync"}
DEFAULT_INTERVAL = 4
DEFAULT_RATIO = 0.05
_BITS = 24


@dataclass(frozen=True, kw_only=True)
class RandomBranches(Scheduled):
    ratio: float

    name: ClassVar[str] = "random"
    unit: ClassVar[Unit] = "branch"

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        return RefreshPlan((uniform(step, view) < self.ratio) | ~view.match.found_TK)


def uniform(step: StepContext, view: LayerView) -> Tensor:
    """[T, K] in [0, 1): a hash of image, token, expert, layer, half and step, so that no batch changes the draw."""
    half = 0 if view.half == "conditional" else 1
    where = (step.index * 1_000_003 + view.layer) * 2 + half
    per_token_T = _mixed(view.image_ids_T + view.positions_T * 7_919 + where * 104_729)
    per_branch_TK = _mixed(per_token_T[:, None] + view.routing.expert_ids_TK * 15_485_863)
    return (per_branch_TK & (2**_BITS - 1)).float() / 2**_BITS


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 in wrapping int64 arithmetic, with logical shifts."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)


def build(config: CacheConfig, num_steps: int, guided: bool) -> RandomBranches:
    return RandomBranches(
        schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL),
        ratio=DEFAULT_RATIO if config.ratio is None else config.ratio,
        order=branch_order(config, 0),
        attention_sync=bool(config.attention_sync),
    )

"""The control: a cache step computes unmatched branches and a random share of all branches."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, branch_order, schedule_of
from moeca_dist.cache.policy import BranchPolicy, LayerView
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

OPTIONS = SCHEDULE_OPTIONS | {"order", "ratio", "attention_sync"}
DEFAULT_INTERVAL = 4
DEFAULT_RATIO = 0.05
_BITS = 24


@dataclass(frozen=True, kw_only=True)
class RandomBranches(Scheduled, BranchPolicy):
    """A policy that refreshes each branch with probability ``ratio``."""

    ratio: float

    name: ClassVar[str] = "random"

    def refresh(self, step: StepContext, view: LayerView) -> Tensor:
        return uniform(step, view) < self.ratio


def uniform(step: StepContext, view: LayerView) -> Tensor:
    """Return [N] in [0, 1): a hash of image, token, expert, block, half and step.

    So the draw does not depend on the batch.
    """
    where_B = (step.index * 1_000_003 + view.block) * 2 + view.half_B
    position_T = torch.arange(view.tokens_per_image, device=where_B.device)
    per_token_BT = _mixed((view.image_ids_B + where_B * 104_729)[:, None] + position_T * 7_919)
    per_token_N = per_token_BT.flatten().index_select(0, view.routing.token_N)
    per_branch_N = _mixed(per_token_N + view.routing.expert_N * 15_485_863)
    return (per_branch_N & (2**_BITS - 1)).float() / 2**_BITS


def _mixed(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 in wrapping int64 arithmetic, with logical shifts."""
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

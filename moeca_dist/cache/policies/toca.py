"""ToCa (arXiv 2410.05317) without attention maps: attention is reused, and the feed-forward of some tokens recomputed.

Full steps follow ToCa's schedule. In between, each feed-forward is computed for a share of every image's tokens. The
other tokens keep their stored sum. A feed-forward is a MoE layer with its routed branches and its shared expert, or a
dense MLP.

Adaptations: the published score starts from column sums of the attention map, which fused attention never forms. Here
it starts from the norm of the token's stored feed-forward output. This norm is divided by the norm of all outputs of
the image. It measures how wrong a stale token could be. As published, 0.25 * age / N is added. The best token of each 2
x 2 block gets a bonus, so that refreshed tokens spread. The bonus is a factor of 1.4 here. The share is the same in all
steps, layers and modules.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled
from moeca_dist.cache.policy import ModulePolicy, ModuleView
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.config import CacheConfig

OPTIONS = SCHEDULE_OPTIONS | {"ratio"}
DEFAULT_INTERVAL = 4
DEFAULT_RATIO = 0.07
AGE_WEIGHT = 0.25
BLOCK_BONUS = 1.4


@dataclass(frozen=True, kw_only=True)
class Toca(Scheduled, ModulePolicy):
    interval: int
    ratio: float

    name: ClassVar[str] = "toca"
    refreshes_tokens: ClassVar[bool] = True

    def tokens(self, view: ModuleView) -> Tensor:
        score_BT = self.score(view)
        order_BT = score_BT.argsort(dim=-1, descending=True, stable=True)
        chosen_BT = torch.zeros_like(score_BT, dtype=torch.bool)
        return chosen_BT.scatter_(1, order_BT[:, : round(self.ratio * score_BT.shape[1])], True)

    def remark(self, statistics: CacheStatistics) -> str | None:
        # Rows are counted in cache steps alone, be it that there were none.
        if self.ratio and statistics.rows and not statistics.rows.total():
            return f"cache.ratio {self.ratio} chose nothing: it is less than one token of an image"
        return None

    def score(self, view: ModuleView) -> Tensor:
        """Return [B, T]: a higher score for tokens that are more urgent to compute."""
        norms_BT = view.value_BTD.float().norm(dim=-1)
        norms_BT = norms_BT / norms_BT.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        score_BT = norms_BT + AGE_WEIGHT * view.age_BT / self.interval
        block_T = _blocks_of_two(score_BT.shape[1], score_BT.device).expand_as(score_BT)
        best_BX = torch.zeros_like(score_BT).scatter_reduce(1, block_T, score_BT, "amax", include_self=False)
        return torch.where(score_BT == best_BX.gather(1, block_T), BLOCK_BONUS * score_BT, score_BT)


def _blocks_of_two(tokens: int, device: torch.device) -> Tensor:
    """Return the 2 x 2 block of each token of a square image, in row-major order."""
    side = math.isqrt(tokens)
    assert side * side == tokens, "images are square"
    half_S = torch.arange(side, device=device) // 2
    return (half_S[:, None] * ((side + 1) // 2) + half_S).flatten()


def build(config: CacheConfig, num_steps: int, guided: bool) -> Toca:
    interval = config.interval or DEFAULT_INTERVAL
    if config.full_steps is not None:
        schedule = FullSteps.listed(config.full_steps, num_steps, guided=guided)
    else:
        schedule = FullSteps.toca(interval, num_steps)
    ratio = DEFAULT_RATIO if config.ratio is None else config.ratio
    return Toca(schedule=schedule, interval=interval, ratio=ratio)

"""MoECa (arXiv 2606.15615): a score decides which branches are recomputed, with a threshold for each expert.

In a cache step the router runs on the input made with the *stored* attention output. A matched branch has this score:

    s = w_t + LAMBDA_1 * (w_t - w_t0) + LAMBDA_2 * |h_q| / sum_j |h_j|

It is refreshed if ``s > tau_e = tau_0 * (1 + ALPHA * (2 H_e - 1))``. Unmatched branches are always computed. A token
with a refreshed branch refreshes its attention row too, and the branch sees the input made with that row.

The paper leaves some points open. They are decided as follows:

- The paper prints the drift signed, but its prose says "deviates". Option ``drift`` is signed (default) or absolute.
- The scale of w differs between models, so the published tau_0 = 0.80 has no meaning across them. Instead
  ``refresh_ratio`` is the share of all routed branches to refresh, on top of the unmatched ones. tau_0 is the quantile
  of ``s / (1 + ALPHA (2 H - 1))`` that gives this share in each layer, image and step. Position decides ties.
- A served branch keeps w_t0 of the step in which it was computed. Otherwise the drift could not accumulate.
- The sum over j runs over all branches stored for the token.
- H is normalised by min-max over the experts of the layer (``cache.expert_usage.spread``). Each image is normalised on
  its own, because no image depends on its batch. The moving average takes in the current routing before the decision.
- The routing of the step (experts and gates) is the one that was decided on. The router does not run again on the
  fresh-attention input, because new experts would need another decision.
- The shared expert and following dense blocks are refreshed for the tokens that refresh a branch. Dense blocks before
  the first MoE block reuse their outputs: no decision is known there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moeca_dist.cache.expert_usage import spread
from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import BranchPolicy, LayerView
from moeca_dist.cache.statistics import CacheStatistics, Reason
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

OPTIONS = SCHEDULE_OPTIONS | {"drift", "refresh_ratio", "attention_sync"}
DEFAULT_REFRESH_RATIO = 0.05
DEFAULT_INTERVAL = 4  # the paper's N
# Hyper-parameters as the paper (v1) states them, by its symbols.
LAMBDA_1 = 1.0  # weight of the drift in the score
LAMBDA_2 = 0.6  # weight of the branch's share in the norms of the token's stored branches
ALPHA = 0.6  # how much an expert's threshold depends on how widely its tokens spread
BETA = 0.65  # decay of the moving average of expert usage


@dataclass(frozen=True, kw_only=True)
class Moeca(Scheduled, BranchPolicy):
    drift: Literal["signed", "absolute"]
    refresh_ratio: float

    name: ClassVar[str] = "moeca"

    def refresh(self, step: StepContext, view: LayerView) -> Tensor:
        # s > tau_0 * f is s / f > tau_0: one threshold for all experts, because f is positive.
        relative_N = self.score(view) / self.leniency(view)
        return self._highest(relative_N.masked_fill(~view.found_N, -torch.inf), view.num_images)

    def score(self, view: LayerView) -> Tensor:
        """Return the score s of every branch as fp32 [N]. It is meaningless for unmatched branches."""
        assert view.scores is not None
        gate_N = view.routing.gate_N.float()
        drift_N = gate_N - view.scores.gate_N
        if self.drift == "absolute":
            drift_N = drift_N.abs()
        return gate_N + LAMBDA_1 * drift_N + LAMBDA_2 * view.scores.share_N

    def leniency(self, view: LayerView) -> Tensor:
        """Return tau_e / tau_0 as fp32 [N]. It is above 1 for experts whose tokens lie all over the image."""
        assert view.usage_BTE is not None
        factor_BE = 1 + ALPHA * (2 * spread(view.usage_BTE) - 1)
        image_N = view.routing.token_N // max(1, view.tokens_per_image)
        return factor_BE[image_N, view.routing.expert_N]

    def remark(self, statistics: CacheStatistics) -> str | None:
        chosen = statistics.total(Reason.SCORE)
        if chosen or not statistics.total(Reason.SERVED) or not self.refresh_ratio:
            return None
        return f"cache.refresh_ratio {self.refresh_ratio} chose nothing: it is less than one branch of an image"

    def _highest(self, relative_N: Tensor, num_images: int) -> Tensor:
        """Return bool [N]: the ``refresh_ratio`` of each image's branches that score highest."""
        per_image = relative_N.shape[0] // max(1, num_images)
        relative_BX = relative_N.view(num_images, per_image)
        order_BX = relative_BX.argsort(dim=-1, descending=True, stable=True)
        chosen_BX = torch.zeros_like(relative_BX, dtype=torch.bool)
        chosen_BX.scatter_(1, order_BX[:, : round(self.refresh_ratio * per_image)], True)
        return chosen_BX.flatten()


def build(config: CacheConfig, num_steps: int, guided: bool) -> Moeca:
    return Moeca(
        schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL),
        drift=config.drift or "signed",
        refresh_ratio=DEFAULT_REFRESH_RATIO if config.refresh_ratio is None else config.refresh_ratio,
        attention_sync=config.attention_sync is not False,
        usage_decay=BETA,
    )

"""MoECa (arXiv 2606.15615): branches are recomputed by a score against a threshold that depends on their expert.

In a cache step the router runs on the input made with the *stored* attention output. A matched branch has the score

    s = w_t + LAMBDA_1 * (w_t - w_t0) + LAMBDA_2 * |h_q| / sum_j |h_j|

and is refreshed where ``s > tau_e = tau_0 * (1 + ALPHA * (2 H_e - 1))``; unmatched branches always are. A token with a
refreshed branch refreshes its attention row too, and the branch sees the input made with it.

What the paper leaves open, and what is done here:

- The drift is printed signed while the prose says "deviates": ``drift`` signed (default) or absolute.
- The scale of w differs between models, so the published tau_0 = 0.80 has no meaning across them: ``refresh_ratio``
  picks tau_0 for each layer, image and step as the quantile of ``s / (1 + ALPHA (2 H - 1))`` that refreshes this share
  of all routed branches (ties by position), on top of the unmatched.
- A served branch keeps w_t0 of the step in which it was computed, else the drift could not accumulate.
- The sum over j runs over all branches stored for the token.
- H is normalised by min-max over the experts of the layer (``cache.usage.spread``), of each image on its own, because
  no image depends on its batch; the moving average is updated with the current routing before the decision.
- The routing of the step (experts and gates) is the one that was decided on; the router does not run again on the
  fresh-attention input, because new experts would need another decision.
- The shared expert and following dense blocks are refreshed for the tokens that refresh a branch. Dense blocks before
  the first MoE block reuse: no decision is known there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moeca_dist.cache.policies.base import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import LayerView, RefreshPlan, Unit
from moeca_dist.cache.statistics import CacheStatistics, Reason
from moeca_dist.cache.usage import spread
from moeca_dist.config import CacheConfig
from moeca_dist.types import Routing, StepContext

OPTIONS = SCHEDULE_OPTIONS | {"drift", "refresh_ratio", "attention_sync"}
DEFAULT_REFRESH_RATIO = 0.05
DEFAULT_INTERVAL = 4  # the paper's N
# Hyper-parameters as the paper (v1) states them, by its symbols.
LAMBDA_1 = 1.0  # weight of the drift in the score
LAMBDA_2 = 0.6  # weight of the branch's share in the norms of the token's stored branches
ALPHA = 0.6  # how much an expert's threshold depends on how widely its tokens spread
BETA = 0.65  # decay of the moving average of expert usage


@dataclass(frozen=True, kw_only=True)
class Moeca(Scheduled):
    drift: Literal["signed", "absolute"]
    refresh_ratio: float

    name: ClassVar[str] = "moeca"
    unit: ClassVar[Unit] = "branch"
    usage_decay: ClassVar[float | None] = BETA

    def reference_gates(self, routing: Routing) -> Tensor:
        return routing.gates_TK.float()

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        # s > tau_0 * f is s / f > tau_0: one threshold for all experts, because f is positive.
        relative_TK = self.score(view) / self.leniency(view)
        chosen_TK = self._highest(relative_TK.masked_fill(~view.match.found_TK, -torch.inf), view.num_images)
        return RefreshPlan(chosen_TK | ~view.match.found_TK)

    def score(self, view: LayerView) -> Tensor:
        """[T, K] fp32: s of every branch; meaningless where it is unmatched."""
        assert view.reference is not None
        gates_TK = self.reference_gates(view.routing)
        drift_TK = gates_TK - view.reference.gates_TK
        if self.drift == "absolute":
            drift_TK = drift_TK.abs()
        return gates_TK + LAMBDA_1 * drift_TK + LAMBDA_2 * view.reference.shares_TK

    def leniency(self, view: LayerView) -> Tensor:
        """[T, K] fp32: tau_e / tau_0, above 1 for experts whose tokens lie all over the image."""
        assert view.usage_BTE is not None
        factor_BE = 1 + ALPHA * (2 * spread(view.usage_BTE) - 1)
        ids_TK = view.routing.expert_ids_TK
        ids_BX = ids_TK.reshape(view.num_images, ids_TK.numel() // max(1, view.num_images))
        return factor_BE.gather(1, ids_BX).view_as(ids_TK)

    def remark(self, statistics: CacheStatistics) -> str | None:
        if statistics.total(Reason.SCORE) or not statistics.total(Reason.SERVED) or not self.refresh_ratio:
            return None
        return f"cache.refresh_ratio {self.refresh_ratio} chose nothing: it is less than one branch of an image"

    def _highest(self, relative_TK: Tensor, num_images: int) -> Tensor:
        per_image = relative_TK.numel() // max(1, num_images)
        relative_BX = relative_TK.view(num_images, per_image)
        order_BX = relative_BX.argsort(dim=-1, descending=True, stable=True)
        chosen_BX = torch.zeros_like(relative_BX, dtype=torch.bool)
        chosen_BX.scatter_(1, order_BX[:, : round(self.refresh_ratio * per_image)], True)
        return chosen_BX.view_as(relative_TK)


def build(config: CacheConfig, num_steps: int, guided: bool) -> Moeca:
    return Moeca(
        schedule=schedule_of(config, num_steps, guided, DEFAULT_INTERVAL),
        drift=config.drift or "signed",
        refresh_ratio=DEFAULT_REFRESH_RATIO if config.refresh_ratio is None else config.refresh_ratio,
        attention_sync=config.attention_sync is not False,
    )

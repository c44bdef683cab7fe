"""MoECa (arXiv 2606.15615): branches are recomputed by a score against a threshold that depends on their expert.

In a cache step the router runs on the input made with the *stored* attention output. A matched branch has the score

    s = w_t + l1 * (w_t - w_t0) + l2 * |h_q| / sum_j |h_j|

and is refreshed where ``s > tau_e = tau0 * (1 + alpha * (2 H_e - 1))``; unmatched branches always are. A token with a
refreshed branch refreshes its attention row too, and the branch sees the input made with it.

What the paper leaves open, and what is done here:

- The drift is printed signed while the prose says "deviates": ``drift`` signed (default) or absolute.
- The scale of w differs between models: ``gate_scale`` takes the model's gates (default) or gates of sum 1.
- tau0 has no meaning across models, so by default ``refresh_ratio`` picks it for each layer, image and step as the
  quantile of ``s / (1 + alpha (2 H - 1))`` that refreshes this share of all routed branches (ties by position), on top
  of the unmatched. A raw ``tau0`` may be stated in its place.
- A served branch keeps w_t0 of the step in which it was computed, else the drift could not accumulate.
- The sum over j runs over all branches stored for the token.
- H is normalised by min-max over the experts of the layer (``cache.usage.spread``); the moving average is updated with
  the current routing before the decision. ``statistics``: of each image on its own (default: no image depends on its
  batch), or averaged over the images of the batch, which then does depend on it and on how ranks share the images.
- The routing of the step (experts and gates) is the one that was decided on; the router does not run again on the
  fresh-attention input, because new experts would need another decision.
- The shared expert and following dense blocks are refreshed for the tokens that refresh a branch. Dense blocks before
  the first MoE block reuse: no decision is known there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moeca_dist.cache.policies.scheduled import SCHEDULE_OPTIONS, Scheduled, schedule_of
from moeca_dist.cache.policy import LayerView, RefreshPlan, Unit
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.cache.statistics import CacheStatistics, Reason
from moeca_dist.cache.usage import spread
from moeca_dist.config import CacheConfig
from moeca_dist.errors import UserError
from moeca_dist.types import Routing, StepContext

OPTIONS = SCHEDULE_OPTIONS | {
    "schedule", "drift", "gate_scale", "statistics", "drift_weight", "norm_weight", "alpha", "decay", "tau0",
    "refresh_ratio", "attention_sync", "late_refresh",
}  # fmt: skip
DEFAULT_INTERVAL = 4
DEFAULT_REFRESH_RATIO = 0.05


@dataclass(frozen=True, kw_only=True)
class Moeca(Scheduled):
    """``tau0`` None: chosen for ``refresh_ratio`` at every decision."""

    drift: Literal["signed", "absolute"]
    gate_scale: Literal["model", "unit"]
    statistics: Literal["sample", "batch"]
    drift_weight: float
    norm_weight: float
    alpha: float
    tau0: float | None
    refresh_ratio: float

    name: ClassVar[str] = "moeca"
    unit: ClassVar[Unit] = "branch"

    def reference_gates(self, routing: Routing) -> Tensor:
        gates_TK = routing.gates_TK.float()
        return gates_TK if self.gate_scale == "model" else gates_TK / gates_TK.sum(-1, keepdim=True)

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        # s > tau0 * f is s / f > tau0: one threshold for all experts, because f is positive.
        relative_TK = self.score(view) / self.leniency(view)
        if self.tau0 is not None:
            chosen_TK = relative_TK > self.tau0
        else:
            chosen_TK = self._highest(relative_TK.masked_fill(~view.match.found_TK, -torch.inf), view.num_images)
        return RefreshPlan(chosen_TK | ~view.match.found_TK, priority_TK=relative_TK)

    def score(self, view: LayerView) -> Tensor:
        """[T, K] fp32: s of every branch; meaningless where it is unmatched."""
        assert view.reference is not None
        gates_TK = self.reference_gates(view.routing)
        drift_TK = gates_TK - view.reference.gates_TK
        if self.drift == "absolute":
            drift_TK = drift_TK.abs()
        return gates_TK + self.drift_weight * drift_TK + self.norm_weight * view.reference.shares_TK

    def leniency(self, view: LayerView) -> Tensor:
        """[T, K] fp32: tau_e / tau0, above 1 for experts whose tokens lie all over the image."""
        assert view.usage_BTE is not None
        usage_BTE = view.usage_BTE
        if self.statistics == "batch":
            usage_BTE = usage_BTE.mean(0, keepdim=True).expand_as(usage_BTE)
        factor_BE = 1 + self.alpha * (2 * spread(usage_BTE) - 1)
        ids_TK = view.routing.expert_ids_TK
        ids_BX = ids_TK.reshape(view.num_images, ids_TK.numel() // max(1, view.num_images))
        return factor_BE.gather(1, ids_BX).view_as(ids_TK)

    def remark(self, statistics: CacheStatistics) -> str | None:
        chosen = statistics.total(Reason.SCORE) + statistics.total(Reason.LATE)
        served = statistics.total(Reason.SERVED)
        if (chosen and served) or not chosen + served:
            return None
        if self.tau0 is None:
            if chosen or not self.refresh_ratio:
                return None
            return f"cache.refresh_ratio {self.refresh_ratio} chose nothing: it is less than one branch of an image"
        how = "always fired: every branch was computed" if chosen else "never fired: only unmatched branches were"
        return f"cache.tau0 {self.tau0} {how} refreshed in cache steps; cache.refresh_ratio picks a threshold that fits"

    def _highest(self, relative_TK: Tensor, num_images: int) -> Tensor:
        per_image = relative_TK.numel() // max(1, num_images)
        relative_BX = relative_TK.view(num_images, per_image)
        order_BX = relative_BX.argsort(dim=-1, descending=True, stable=True)
        chosen_BX = torch.zeros_like(relative_BX, dtype=torch.bool)
        chosen_BX.scatter_(1, order_BX[:, : round(self.refresh_ratio * per_image)], True)
        return chosen_BX.view_as(relative_TK)


def build(config: CacheConfig, num_steps: int, guided: bool) -> Moeca:
    if config.tau0 is not None and config.refresh_ratio is not None:
        raise UserError("cache.tau0 and cache.refresh_ratio both set the threshold: keep one of them")
    if config.statistics is not None and config.alpha == 0:
        raise UserError("cache.statistics has no effect with cache.alpha 0, where no threshold depends on the expert")
    if config.decay is not None and config.alpha == 0:
        raise UserError("cache.decay has no effect with cache.alpha 0, where no threshold depends on the expert")
    return Moeca(
        schedule=_schedule(config, num_steps, guided),
        drift=config.drift or "signed",
        gate_scale=config.gate_scale or "model",
        statistics=config.statistics or "sample",
        drift_weight=1.0 if config.drift_weight is None else config.drift_weight,
        norm_weight=0.6 if config.norm_weight is None else config.norm_weight,
        alpha=0.6 if config.alpha is None else config.alpha,
        usage_decay=0.65 if config.decay is None else config.decay,
        tau0=config.tau0,
        refresh_ratio=DEFAULT_REFRESH_RATIO if config.refresh_ratio is None else config.refresh_ratio,
        attention_sync=config.attention_sync is not False,
    )


def _schedule(config: CacheConfig, num_steps: int, guided: bool) -> FullSteps:
    if config.schedule is not None and config.full_steps is not None:
        raise UserError("cache.schedule and cache.full_steps both place the full steps: keep one of them")
    if config.schedule == "toca":
        return FullSteps.toca(config.interval or DEFAULT_INTERVAL, num_steps)
    return schedule_of(config, num_steps, guided, DEFAULT_INTERVAL)

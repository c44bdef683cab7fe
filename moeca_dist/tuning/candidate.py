"""What is tried: a policy with its order and schedule; and what a real run of it gave."""

from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from scipy.stats import nct, norm

from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.cache.policy import BranchPolicy, NetworkPolicy
from moeca_dist.config import CacheConfig, HalvesConfig
from moeca_dist.models.flops import forward_flops
from moeca_dist.models.spec import ModelSpec
from moeca_dist.tuning.schedules import Schedule

PolicyName = Literal["network_forecast", "taylorseer", "moeca_forecast"]
# Every policy that places its full steps freely, with the orders that the search tries.
ORDERS: tuple[tuple[PolicyName, tuple[int, ...]], ...] = (
    ("network_forecast", (0, 1, 2)),
    ("taylorseer", (0, 1, 2)),
    ("moeca_forecast", (0, 1)),
)
COVERED, CONFIDENCE = 0.95, 0.9


@dataclass(frozen=True)
class Candidate:
    policy: PolicyName
    order: int
    schedule: Schedule

    def cache(self) -> CacheConfig:
        """The ``cache:`` section that runs it."""
        halves = [list(steps) for steps in self.schedule]
        full_steps: list[int] | HalvesConfig = halves[0]
        if len(halves) == 2:
            full_steps = HalvesConfig(conditional=halves[0], unconditional=halves[1])
        return CacheConfig(policy=self.policy, order=self.order, full_steps=full_steps)

    def predicted_speedup(self, spec: ModelSpec, num_steps: int) -> float:
        """Ratio of FLOPs, without what unmatched branches add."""
        policy = build_policy(self.cache(), num_steps, guided=len(self.schedule) == 2)
        assert policy is not None
        flops = forward_flops(spec)
        saved = flops.blocks if isinstance(policy, NetworkPolicy) else flops.blocks - flops.modulation
        if isinstance(policy, BranchPolicy):
            saved -= flops.router
        evaluations = len(self.schedule) * num_steps
        served = evaluations - sum(len(steps) for steps in self.schedule)
        return evaluations * flops.total / (evaluations * flops.total - served * saved)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Candidate":
        return cls(tree["policy"], tree["order"], tuple(tuple(steps) for steps in tree["schedule"]))


@dataclass(frozen=True)
class Figures:
    """A run's ratio of FLOPs and, per image, its closeness to the exact ones: PSNR, or signal-to-noise of latents."""

    speedup: float
    db: tuple[float, ...]

    @property
    def mean_db(self) -> float:
        return fmean(self.db)

    @property
    def bound_db(self) -> float:
        return tolerance_bound(self.db)

    def share_above(self, db: float) -> float:
        return fmean(each >= db for each in self.db)


@dataclass(frozen=True)
class Trial(Figures):
    """A real calibrated run on the images that it was fitted on."""

    candidate: Candidate

    def to_json(self) -> dict[str, Any]:
        return {"candidate": self.candidate.to_json(), "speedup": self.speedup, "db": self.db}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Trial":
        return cls(tree["speedup"], tuple(tree["db"]), Candidate.from_json(tree["candidate"]))


def tolerance_bound(values: tuple[float, ...]) -> float:
    """What 95% of all images exceed, with 90% confidence: the one-sided tolerance bound of a normal sample.

    Images' PSNRs are close to normal. From few images the bound is lower than their 5% quantile, as it must be. Minus
    infinity for a single image.
    """
    count = len(values)
    if count < 2:
        return float("-inf")
    root = count**0.5
    factor = float(nct.ppf(CONFIDENCE, count - 1, norm.ppf(COVERED) * root)) / root
    return fmean(values) - factor * stdev(values)

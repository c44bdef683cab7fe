"""Where branch values are kept: what the user asked for, or what should send fewer bytes."""

from typing import Literal

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.config import CacheConfig
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.predict import Load, home_bytes, owner_bytes
from moeca_dist.types import StepContext

Placement = Literal["home", "owner"]

TYPICAL_REFRESH_SHARE = 0.02
"""Share of its branches that a cache step finds unmatched, as on the shipped model with the default schedule."""


def choose_placement(
    config: CacheConfig, policy: Policy, num_steps: int, halves: tuple[Half, ...], k: int, row_bytes: int,
    experts: ExpertPlacement,
) -> Placement | None:  # fmt: skip
    """None where it is moot: one rank holds all experts, or the policy keeps no branches.

    ``k``: routed experts per token; ``row_bytes``: size of a hidden row. Follows from the configuration and the
    model alone, so all ranks choose the same.
    """
    if experts.num_ranks == 1 or policy.unit != "branch":
        return None
    if policy.usage_decay is not None:
        return "home"
    if config.placement != "auto":
        return config.placement or "home"
    full = [policy.is_full(StepContext(step, num_steps, 0.0), half) for step in range(num_steps) for half in halves]
    share = TYPICAL_REFRESH_SHARE if config.ratio is None else max(config.ratio, TYPICAL_REFRESH_SHARE)
    load = Load(k, row_bytes, sum(full) / len(full), share)
    return "owner" if owner_bytes(load, experts) < home_bytes(load, experts) else "home"

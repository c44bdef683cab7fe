"""Where branch values are kept: what the user asked for, or what should send fewer bytes."""

from typing import Literal

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.config import CacheConfig, Config
from moeca_dist.errors import UserError
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.predict import Load, home_bytes, owner_bytes
from moeca_dist.types import StepContext

Placement = Literal["home", "owner"]

TYPICAL_REFRESH_SHARE = 0.02
"""Share of its branches that a cache step finds unmatched, as on the shipped model with the default schedule."""


def check_exchange(config: Config, policy: Policy | None) -> None:
    """Raise UserError where ``parallel.exchange planned`` would have no effect, or cannot be carried out."""
    if config.parallel.exchange != "planned":
        return
    if policy is None or policy.unit != "branch":
        keeps = "caches nothing" if policy is None else "decides on no single branches"
        raise UserError(
            f"parallel.exchange planned has no effect with cache.policy {config.cache.policy}, which {keeps}: "
            "remove it, or choose moeca_forecast, moeca or random"
        )
    if config.cache.placement not in (None, "home"):
        raise UserError(
            f"parallel.exchange planned keeps branch values at home, not where cache.placement "
            f"{config.cache.placement} may put them: remove cache.placement, or use parallel.exchange exact"
        )


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

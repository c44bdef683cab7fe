"""The side of the exchange that keeps branch values: as configured, or the one that should send fewer bytes."""

from typing import Literal

from moeca_dist.cache.policy import BranchPolicy, Policy
from moeca_dist.config import CacheConfig

Location = Literal["home", "owner"]


def choose_location(config: CacheConfig, policy: Policy | None, k: int, ep_size: int) -> Location | None:
    """Choose which side of the exchange keeps branch values. The choice is the same on all ranks.

    Args:
        k: routed experts per token.

    Returns:
        The location. None if nothing travels or no branches are kept.
    """
    if not isinstance(policy, BranchPolicy) or ep_size == 1:
        return None
    if policy.usage_decay is not None:
        return "home"  # the score reads the stored branches
    if config.location != "auto":
        return config.location or "home"
    # With two ranks a token has one other owner at most, whose one sum stands for several branches in a full step.
    # With more ranks a single refreshed branch makes every owner of its token answer.
    return "owner" if ep_size == 2 and k > 1 else "home"

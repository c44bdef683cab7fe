"""Where branch values are kept: what the user asked for, or what should send fewer bytes."""

from typing import Literal

from moeca_dist.cache.policy import Policy
from moeca_dist.config import CacheConfig

Placement = Literal["home", "owner"]


def choose_placement(config: CacheConfig, policy: Policy | None, k: int, ep_size: int) -> Placement | None:
    """Choose which side of the exchange keeps branch values; None if nothing travels or no branches are kept.

    ``k``: routed experts per token. The choice is the same on all ranks.
    """
    if policy is None or policy.unit != "branch" or ep_size == 1:
        return None
    if policy.usage_decay is not None:
        return "home"  # the score reads the stored branches
    if config.placement != "auto":
        return config.placement or "home"
    # With two ranks a token has one other owner at most, whose one sum stands for several branches in a full step.
    # With more ranks a single refreshed branch makes every owner of its token answer.
    return "owner" if ep_size == 2 and k > 1 else "home"

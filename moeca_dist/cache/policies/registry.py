"""The caching policies by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moeca_dist.cache.policies import (
    dice_skip,
    moeca,
    moeca_forecast,
    network_forecast,
    random,
    taylorseer,
    teacache,
    toca,
)
from moeca_dist.cache.policy import BranchPolicy, Policy
from moeca_dist.config import CacheConfig
from moeca_dist.errors import UserError

Builder = Callable[[CacheConfig, int, bool], Policy]

# Name -> (how to build it from the configuration, the number of steps and whether there is guidance; options it reads)
POLICIES: Mapping[str, tuple[Builder, frozenset[str]]] = MappingProxyType(
    {
        "fora": (taylorseer.build_fora, taylorseer.FORA_OPTIONS),
        "taylorseer": (taylorseer.build, taylorseer.OPTIONS),
        "moeca": (moeca.build, moeca.OPTIONS),
        "moeca_forecast": (moeca_forecast.build, moeca_forecast.OPTIONS),
        "network_forecast": (network_forecast.build, network_forecast.OPTIONS),
        "toca": (toca.build, toca.OPTIONS),
        "teacache": (teacache.build, teacache.OPTIONS),
        "dice_skip": (dice_skip.build, dice_skip.OPTIONS),
        "random": (random.build, random.OPTIONS),
    }
)


# Options that are no policy's own.
_FOR_ALL = frozenset({"location", "calibration", "dtype", "memory_limit"})


def build_policy(config: CacheConfig, num_steps: int, *, guided: bool) -> Policy | None:
    """Build the policy that ``config`` names, or None for ``none``, the exact path.

    Raises UserError for an option that the policy does not read, and for schedules that do not fit ``num_steps``.
    """
    given = {
        name
        for name, field in type(config).model_fields.items()
        if name != "policy" and getattr(config, name) != field.default
    }
    if config.policy == "none":
        if given:
            raise UserError(f"cache.{min(given)} has no effect with cache.policy none: remove it or choose a policy")
        return None
    build, reads = POLICIES[config.policy]
    if stray := given - reads - _FOR_ALL:
        known = ", ".join(sorted(reads))
        raise UserError(f"cache.{min(stray)} has no effect with cache.policy {config.policy}, which reads {known}")
    if config.interval is not None and config.full_steps is not None:
        raise UserError("cache.interval and cache.full_steps both place the full steps: keep one of them")
    policy = build(config, num_steps, guided)
    if "calibration" in given and not policy.is_scheduled:
        raise UserError(f"cache.calibration: policy {config.policy} places its full steps while it runs; remove it")
    if "location" in given and not isinstance(policy, BranchPolicy):
        raise UserError(f"cache.location has no effect with cache.policy {config.policy}, which keeps no branches")
    if config.location == "owner" and isinstance(policy, BranchPolicy) and policy.usage_decay is not None:
        # The score reads the norms of the stored branches, which lie beside the values.
        raise UserError(f"cache.location owner: policy {config.policy} scores stored branches at home; use home")
    return policy

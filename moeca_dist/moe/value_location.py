"""Where branch values are kept and how many rows travel: what the user asked for, or what should send fewer bytes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from moeca_dist.cache.policy import Policy
from moeca_dist.config import CacheConfig, Config, ParallelConfig
from moeca_dist.errors import UserError
from moeca_dist.parallel.expert_placement import ExpertPlacement

Placement = Literal["home", "owner"]


def check_exchange(config: Config, policy: Policy | None) -> None:
    """Raise UserError where another exchange mode than ``exact`` would have no effect, or cannot be carried out."""
    mode = config.parallel.exchange
    if mode == "exact":
        return
    if policy is None or policy.unit != "branch":
        keeps = "caches nothing" if policy is None else "decides on no single branches"
        raise UserError(
            f"parallel.exchange {mode} has no effect with cache.policy {config.cache.policy}, which {keeps}: "
            "remove it, or choose moeca_forecast, moeca or random"
        )
    if config.cache.placement not in (None, "home"):
        raise UserError(
            f"parallel.exchange {mode} keeps branch values at home, not where cache.placement "
            f"{config.cache.placement} may put them: remove cache.placement, or use parallel.exchange exact"
        )
    if mode == "budget" and config.parallel.expert_placement is not None:
        raise UserError(
            "parallel.exchange budget gives rows to equal runs of experts, not to those of parallel.expert_placement: "
            "remove it, or use parallel.exchange exact"
        )


def budget_groups(config: ParallelConfig, experts: ExpertPlacement) -> tuple[int, ...]:
    """The group of each expert in exchange mode ``budget``: one for each rank, or as many as configured.

    Raises UserError where a group's experts are not all on one rank, or ranks have different numbers of groups.
    """
    if config.budget_groups is None:
        return experts.owner_of_expert
    wanted, ranks = config.budget_groups, experts.num_ranks
    groups = ExpertPlacement.contiguous(experts.num_experts, wanted).owner_of_expert
    per_rank = wanted // ranks
    fits = wanted % ranks == 0 and wanted <= experts.num_experts
    if not fits or any(
        group // per_rank != owner for group, owner in zip(groups, experts.owner_of_expert, strict=True)
    ):
        raise UserError(
            f"parallel.budget_groups {wanted} does not divide {experts.num_experts} experts on {ranks} ranks so that "
            "each rank has the same number of whole groups: take a multiple of the number of ranks that divides the "
            "experts"
        )
    return groups


def budget_rows(
    config: ParallelConfig, blocks: Sequence[int], num_tokens: int, k: int, groups: Sequence[int]
) -> dict[int, int]:
    """Rows of each image, guidance half and group, by MoE block; never more than the group can need.

    ``num_tokens``: of one image; ``k``: routed experts per token; ``groups``: of each expert. Raises UserError for a
    list of another length than that of ``blocks``.
    """
    stated = config.budget
    assert stated is not None
    each = stated if isinstance(stated, list) else [stated] * len(blocks)
    if len(each) != len(blocks):
        raise UserError(f"parallel.budget lists {len(each)} blocks, but the model has {len(blocks)} MoE blocks")
    most = num_tokens * min(k, max(Counter(groups).values()))
    rows = [math.ceil(value * num_tokens * k) if isinstance(value, float) else value for value in each]
    return {block: min(most, value) for block, value in zip(blocks, rows, strict=True)}


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

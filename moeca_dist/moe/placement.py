"""Where branch values are kept and how many rows travel: what the user asked for, or what should send fewer bytes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.config import CacheConfig, Config, ParallelConfig
from moeca_dist.errors import UserError
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.predict import Load, home_bytes, owner_bytes
from moeca_dist.types import StepContext

Placement = Literal["home", "owner"]

TYPICAL_REFRESH_SHARE = 0.02
"""Share of its branches that a cache step finds unmatched, as on the shipped model with the default schedule."""


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

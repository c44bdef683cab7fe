"""What the two cache placements should send, before anything ran: uniform routing, independent refreshes.

Counted in bytes per token of one MoE layer and step, averaged over the ranks as homes.
"""

from dataclasses import dataclass
from math import comb

from moeca_dist.parallel.all_to_all import BRANCH_HEADER_BYTES
from moeca_dist.parallel.pairs import HEADER_BYTES
from moeca_dist.parallel.placement import ExpertPlacement


@dataclass(frozen=True)
class Load:
    """``full_share``: share of the steps that compute everything; ``refresh_share``: of the branches in the others."""

    num_experts_per_tok: int
    row_bytes: int
    full_share: float
    refresh_share: float


def home_bytes(load: Load, placement: ExpertPlacement) -> float:
    """Every refreshed branch that lives elsewhere: a header there and a row back; its hidden row once per owner."""
    full = _home_step(load, placement, 1.0)
    return load.full_share * full + (1 - load.full_share) * _home_step(load, placement, load.refresh_share)


def owner_bytes(load: Load, placement: ExpertPlacement) -> float:
    """Of touched tokens: all headers and one row back per owner; one row there where something is refreshed."""
    full = _owner_step(load, placement, 1.0)
    return load.full_share * full + (1 - load.full_share) * _owner_step(load, placement, load.refresh_share)


def _home_step(load: Load, placement: ExpertPlacement, refresh: float) -> float:
    k, ranks = load.num_experts_per_tok, placement.num_ranks
    hidden = sum(
        1 - _none_chosen(k, placement.served_to_others(owner), placement.num_experts, refresh) for owner in range(ranks)
    )
    per_branch = load.row_bytes + BRANCH_HEADER_BYTES
    return (ranks - 1) / ranks * (hidden * load.row_bytes + k * _placed_share(placement) * refresh * per_branch)


def _owner_step(load: Load, placement: ExpertPlacement, refresh: float) -> float:
    k, ranks = load.num_experts_per_tok, placement.num_ranks
    touched = 1 - (1 - refresh) ** k
    rows = 0.0
    for owner in range(ranks):
        held = placement.served_to_others(owner)
        involved = 1 - _none_chosen(k, held, placement.num_experts, 1.0)
        hidden = 1 - _none_chosen(k, held, placement.num_experts, refresh)
        # An owner answers where it is involved and something of the token is refreshed, there or elsewhere.
        idle_elsewhere = (1 - refresh) ** k * involved
        rows += hidden + involved - idle_elsewhere
    return (ranks - 1) / ranks * (rows * load.row_bytes + touched * k * _placed_share(placement) * HEADER_BYTES)


def _placed_share(placement: ExpertPlacement) -> float:
    """Of the experts, those that live on one rank alone."""
    return 1 - len(placement.replicated) / placement.num_experts


def _none_chosen(k: int, held: int, num_experts: int, refresh: float) -> float:
    """Probability that none of a token's k distinct experts is both one of ``held`` and refreshed."""
    chances = (comb(held, here) * comb(num_experts - held, k - here) for here in range(k + 1))
    return sum(ways * (1 - refresh) ** here for here, ways in enumerate(chances)) / comb(num_experts, k)

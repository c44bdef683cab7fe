"""Which rank should own which expert: chosen from a routing trace, for even load and short exchanges.

Two things are weighed against each other, block by block. The slowest rank decides how long a step takes, so the rows
that experts compute should be spread evenly in every step. And experts that are often chosen together should share a
rank: a token's hidden row then travels there once. Every rank keeps as many experts as with equal runs, so memory stays
as it was; where there is more of it, the experts that compute most can be held by every rank, and nothing travels to
them.

Shape suffixes: S steps, E experts, P ranks, N tokens of all steps, K routed experts per token.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeca_dist.errors import UserError
from moeca_dist.parallel.expert_placement import ExpertPlacement, PlacementTable
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.tuning.experts.traffic import Returns, RowBytes, layer_traffic

DEFAULT_BALANCE = 0.5
_MOST_STEPS = 64  # longer runs are added up in groups of steps
_MOST_SWAPS = 1000
_LEAST_GAIN = 1e-6


def assign_experts(
    trace: RoutingTrace, num_ranks: int, balance: float = DEFAULT_BALANCE, replicas: int = 0
) -> PlacementTable:
    """A table for ``num_ranks`` ranks. ``balance`` in [0, 1]: 1 looks at load alone, 0 at traffic alone.

    ``replicas``: experts of each block, those with most branches, that every rank holds. Raises UserError for more
    than there are.
    """
    if replicas > trace.num_experts:
        raise UserError(
            f"{replicas} experts of each block cannot be replicated, it has {trace.num_experts}: take fewer"
        )
    tables = {}
    for place, block in enumerate(trace.blocks):
        ids_SNK = trace.expert_ids_SLHBTK[:, place].reshape(trace.num_steps, -1, trace.num_experts_per_tok)
        refreshed_SNK = trace.refreshed_SLHBTK[:, place].reshape(ids_SNK.shape)
        load_SE = _loads(ids_SNK, refreshed_SNK, trace.num_experts)
        together_EE = _together(ids_SNK, refreshed_SNK, trace.num_experts)
        hottest = np.argsort(-load_SE.sum(0), kind="stable")
        copied, placed = np.sort(hottest[:replicas]), np.sort(hottest[replicas:])
        # Who owns what every rank holds decides nothing.
        owner_E = np.zeros(trace.num_experts, np.int64)
        owner_E[copied] = np.arange(replicas) % num_ranks
        owner_E[placed] = _assign(load_SE[:, placed], together_EE[np.ix_(placed, placed)], num_ranks, balance)
        tables[block] = ExpertPlacement(tuple(owner_E.tolist()), num_ranks, tuple(copied.tolist()))
    return PlacementTable(tables)


@dataclass(frozen=True)
class PlacementEffect:
    """What a table makes of a trace, averaged over steps and blocks.

    ``bytes_per_step``: payload of all ranks together. ``slowest_load``: branches computed by the busiest rank of each
    layer over the mean of the ranks; 1 is perfectly even.
    """

    bytes_per_step: float
    slowest_load: float


def placement_effect(trace: RoutingTrace, table: PlacementTable, num_ranks: int) -> PlacementEffect:
    """Replay ``trace`` on ``num_ranks`` ranks with its images dealt as a run deals them; branches kept at home."""
    home_N = homes(trace, num_ranks)
    sent, slowest, mean = 0, 0, 0.0
    returns: Returns = "branches" if trace.keeps_branches else "sums"
    row = RowBytes.exact(trace.row_bytes)
    for place, block in enumerate(trace.blocks):
        placement = table.by_block[block]
        for step in range(trace.num_steps):
            ids_NK = trace.expert_ids_SLHBTK[step, place].reshape(-1, trace.num_experts_per_tok)
            refreshed_NK = trace.refreshed_SLHBTK[step, place].reshape(ids_NK.shape)
            traffic = layer_traffic(ids_NK, refreshed_NK, home_N, placement, row, returns)
            load_P = traffic.rows_PE.sum(1)
            sent, slowest, mean = sent + traffic.bytes_sent, slowest + load_P.max(), mean + load_P.mean()
    return PlacementEffect(sent / trace.num_steps, slowest / mean if mean else 1.0)


def homes(trace: RoutingTrace, num_ranks: int) -> NDArray[np.int64]:
    """The rank of every token of a step [H * B * T], images dealt as evenly as a run deals them."""
    images = trace.num_images
    bounds = np.array([rank * images // num_ranks for rank in range(num_ranks + 1)])
    rank_of_image_B = np.repeat(np.arange(num_ranks), np.diff(bounds))
    _, _, halves, _, tokens, _ = trace.expert_ids_SLHBTK.shape
    return np.tile(np.repeat(rank_of_image_B, tokens), halves)


def _loads(ids_SNK: NDArray[np.integer], refreshed_SNK: NDArray[np.bool_], num_experts: int) -> NDArray[np.float64]:
    """[S, E]: branches computed; steps in which nothing is are left out, many are added up in groups."""
    load_SE = np.stack([np.bincount(i[r], minlength=num_experts) for i, r in zip(ids_SNK, refreshed_SNK, strict=True)])
    load_SE = load_SE[load_SE.any(1)]
    groups = np.array_split(load_SE, min(len(load_SE), _MOST_STEPS)) if len(load_SE) else [np.zeros((1, num_experts))]
    return np.stack([group.sum(0) for group in groups]).astype(np.float64)


def _together(ids_SNK: NDArray[np.integer], refreshed_SNK: NDArray[np.bool_], num_experts: int) -> NDArray[np.float64]:
    """[E, E], zero diagonal: how many tokens computed both experts in the same step."""
    found_EE = np.zeros((num_experts, num_experts))
    for ids_NK, refreshed_NK in zip(ids_SNK, refreshed_SNK, strict=True):
        chosen_NE = np.zeros((len(ids_NK), num_experts), np.float32)
        np.put_along_axis(chosen_NE, ids_NK.astype(np.int64), refreshed_NK.astype(np.float32), 1)
        found_EE += chosen_NE.T @ chosen_NE
    np.fill_diagonal(found_EE, 0)
    return found_EE


def _assign(
    load_SE: NDArray[np.float64], together_EE: NDArray[np.float64], num_ranks: int, balance: float
) -> tuple[int, ...]:
    """Exchange pairs of experts between ranks while that helps, from equal runs and from a greedy even start."""
    if not load_SE.shape[1]:
        return ()
    equal = np.array(ExpertPlacement.contiguous(load_SE.shape[1], num_ranks).owner_of_expert, np.int64)
    starts = (equal, _spread(load_SE.sum(0), np.bincount(equal, minlength=num_ranks)))
    found = [_improved(start, load_SE, together_EE, num_ranks, balance) for start in starts]
    return tuple(min(found, key=lambda outcome: outcome[0])[1].tolist())


def _spread(load_E: NDArray[np.float64], capacity_P: NDArray[np.integer]) -> NDArray[np.int64]:
    """Heaviest expert first, each to the least loaded rank that has room."""
    owner_E, load_P, room_P = np.zeros(len(load_E), np.int64), np.zeros(len(capacity_P)), capacity_P.copy()
    for expert in np.argsort(-load_E, kind="stable"):
        rank = int(np.argmin(np.where(room_P > 0, load_P, np.inf)))
        owner_E[expert] = rank
        load_P[rank] += load_E[expert]
        room_P[rank] -= 1
    return owner_E


def _improved(
    start_E: NDArray[np.int64],
    load_SE: NDArray[np.float64],
    together_EE: NDArray[np.float64],
    num_ranks: int,
    balance: float,
) -> tuple[float, NDArray[np.int64]]:
    """The best swap of two experts, again and again; returns the cost as well.

    Cost: ``balance`` x (load of the slowest rank over the mean) - (1 - ``balance``) x (pairs of branches that share
    a rank, per branch).
    """
    owner_E = start_E.copy()
    mean, branches = max(load_SE.sum() / num_ranks, 1.0), max(load_SE.sum(), 1.0)

    def cost_of(owner_E: NDArray[np.int64]) -> float:
        load_SP = load_SE @ np.eye(num_ranks)[owner_E]
        inside = together_EE[owner_E[:, None] == owner_E[None, :]].sum() / 2
        return float(balance * load_SP.max(1).sum() / mean - (1 - balance) * inside / branches)

    cost = cost_of(owner_E)
    for _ in range(_MOST_SWAPS):
        gains_EE = _swap_costs(owner_E, load_SE, together_EE, num_ranks, balance / mean, (1 - balance) / branches)
        first, second = np.unravel_index(np.argmin(gains_EE), gains_EE.shape)
        if gains_EE[first, second] > cost - _LEAST_GAIN:
            break
        owner_E[[first, second]] = owner_E[[second, first]]
        cost = float(gains_EE[first, second])
    return cost, owner_E


def _swap_costs(
    owner_E: NDArray[np.int64],
    load_SE: NDArray[np.float64],
    together_EE: NDArray[np.float64],
    num_ranks: int,
    load_weight: float,
    inside_weight: float,
) -> NDArray[np.float64]:
    """[E, E]: the cost after swapping two experts; infinite for two of the same rank."""
    member_EP = np.eye(num_ranks)[owner_E]
    load_SP, beside_EP = load_SE @ member_EP, together_EE @ member_EP
    inside = (beside_EP * member_EP).sum() / 2
    own_E = beside_EP[np.arange(len(owner_E)), owner_E]
    cost_EE = np.full(together_EE.shape, np.inf)
    for expert, rank in enumerate(owner_E):
        others = np.flatnonzero(owner_E > rank)
        if not others.size:
            continue
        # What moves from the other's rank to this one's, by step and candidate.
        moved_SC = load_SE[:, others] - load_SE[:, [expert]]
        load_SCP = np.repeat(load_SP[:, None], others.size, 1)
        load_SCP[:, :, rank] += moved_SC
        load_SCP[:, np.arange(others.size), owner_E[others]] -= moved_SC
        gained_C = beside_EP[expert, owner_E[others]] + beside_EP[others, rank] - 2 * together_EE[expert, others]
        inside_C = inside + gained_C - own_E[expert] - own_E[others]
        cost_EE[expert, others] = load_weight * load_SCP.max(2).sum(0) - inside_weight * inside_C
    return cost_EE

"""The exchange of placement ``owner``: headers and hidden rows to the owners, pre-summed rows back.

A pair is a token and a rank that owns some of its experts. A token travels ("touched") if any of its branches is
refreshed; then every owner of its experts gets a header that names its branches, the owners where something is
refreshed get the hidden row, once, and each owner returns one row: the weighted sum of the branches it holds.

Shape suffixes: T tokens of this rank, K routed experts per token, D hidden size, E experts, P ranks of the group,
N branches sent, M pairs sent, H hidden rows received, R branches received, S pairs received.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.parallel.exchange import Exchange
from moeca_dist.parallel.placement import ExpertPlacement

HEADER_BYTES = 12  # per branch: expert and flags, row, gate; three words
_STARTS_PAIR, _REFRESH, _FOUND, _EXPERT_SHIFT = 1, 2, 4, 3


@dataclass(frozen=True)
class Asked:
    """What a home rank asks of the owners, for all its tokens.

    ``rows_TK``: where each branch is in its owner's cache; ``found_TK``: whether it is there already. Tokens without a
    refreshed branch stay at home.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor
    refresh_TK: Tensor
    found_TK: Tensor
    rows_TK: Tensor


@dataclass(frozen=True)
class PairPlan:
    """Where the pairs of one exchange went: splits in pairs per rank; ``payload`` is the same on all ranks."""

    token_M: Tensor
    sent_splits: tuple[int, ...]
    received_splits: tuple[int, ...]
    payload: bool


@dataclass(frozen=True)
class ArrivedPairs:
    """Branches that an owner is asked for, pair by pair, in the order of the home ranks.

    ``starts_S``: the first branch of each pair. ``hidden_row_R``: the hidden row of each branch, meaningful where it
    is refreshed. ``local_expert_R``: positions among the owner's experts. ``capacities``: rows that each home rank
    uses of this rank's cache.
    """

    hidden_HD: Tensor
    hidden_row_R: Tensor
    home_R: Tensor
    starts_S: Tensor
    local_expert_R: Tensor
    gates_R: Tensor
    refresh_R: Tensor
    found_R: Tensor
    row_R: Tensor
    capacities: tuple[int, ...]
    plan: PairPlan


class PairExchange:
    """Both legs over one group. All ranks agree on every size from the gathered counts, so also on whether to talk."""

    def __init__(self, exchange: Exchange, placement: ExpertPlacement) -> None:
        self.exchange = exchange
        self.num_ranks = placement.num_ranks
        self.owner_of_expert_E = torch.tensor(placement.owner_of_expert, dtype=torch.int64)
        place = {expert: i for rank in range(self.num_ranks) for i, expert in enumerate(placement.experts_of(rank))}
        self.local_id_E = torch.tensor([place[expert] for expert in range(placement.num_experts)], dtype=torch.int64)

    def owners(self, device: torch.device) -> Tensor:
        """The owner [E] of each expert; the tables move once, to wherever routing is computed."""
        self.owner_of_expert_E = self.owner_of_expert_E.to(device)
        self.local_id_E = self.local_id_E.to(device)
        return self.owner_of_expert_E

    def dispatch(self, x_TD: Tensor, asked: Asked, capacities: Sequence[int]) -> ArrivedPairs:
        """``capacities``: rows that this rank uses of each rank's cache."""
        header_N3, owner_N, token_N, starts_N, refresh_N = self._headers(asked)
        pair_N = starts_N.cumsum(0) - 1
        token_M, owner_M = token_N[starts_N], owner_N[starts_N]
        hidden_M = torch.zeros_like(token_M, dtype=torch.bool).index_fill_(0, pair_N[refresh_N], True)
        counts = [torch.bincount(owner, minlength=self.num_ranks) for owner in (owner_N, owner_M, owner_M[hidden_M])]
        counts_4P = torch.stack([*counts, torch.tensor(capacities, device=owner_N.device)])
        traffic_P4P = self.exchange.gather_counts(counts_4P.flatten()).view(self.num_ranks, 4, self.num_ranks)
        branches, pairs, hidden, _ = traffic_P4P[self.exchange.rank].tolist()
        from_branches, from_pairs, from_hidden, wanted = traffic_P4P[:, :, self.exchange.rank].T.tolist()
        plan = PairPlan(token_M, tuple(pairs), tuple(from_pairs), payload=bool(traffic_P4P[:, 0].any()))
        hidden_rows_MD = x_TD.index_select(0, token_M[hidden_M])
        if plan.payload:
            packed, sent = _packed(header_N3, hidden_rows_MD, branches, hidden)
            received = _sizes(from_branches, from_hidden, hidden_rows_MD)
            arrived = self.exchange.all_to_all_rows(packed[:, None], sent, received)
            header_R3, hidden_HD = _unpacked(arrived.squeeze(1), from_branches, from_hidden, hidden_rows_MD)
        else:
            self.exchange.elide()
            header_R3, hidden_HD = header_N3, hidden_rows_MD
        return _read(header_R3, hidden_HD, from_branches, tuple(wanted), plan)

    def combine(self, sums_SD: Tensor, arrived: ArrivedPairs) -> Tensor:
        """[S, D] sums at the owner -> [M, D] rows of this rank's pairs, in the order of ``plan.token_M``."""
        plan = arrived.plan
        if not plan.payload:
            self.exchange.elide()
            return sums_SD
        return self.exchange.all_to_all_rows(sums_SD, plan.received_splits, plan.sent_splits)

    def _headers(self, asked: Asked) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Branches of touched tokens by (owner, token, slot): headers [N, 3], owners, tokens, pair starts, refresh."""
        k = asked.refresh_TK.shape[1]
        owner_of_expert_E = self.owners(asked.refresh_TK.device)
        touched_T = asked.refresh_TK.any(1)
        # NOTE: a host synchronisation on CUDA: the number of touched tokens decides the shapes.
        branch_N = touched_T.repeat_interleave(k).nonzero().squeeze(1)
        owner_N, order_N = owner_of_expert_E[asked.expert_ids_TK.flatten()[branch_N]].sort(stable=True)
        branch_N = branch_N[order_N]
        token_N = branch_N // k
        starts_N = torch.ones_like(token_N, dtype=torch.bool)
        starts_N[1:] = (token_N[1:] != token_N[:-1]) | (owner_N[1:] != owner_N[:-1])
        refresh_N, found_N = asked.refresh_TK.flatten()[branch_N], asked.found_TK.flatten()[branch_N]
        code_N = self.local_id_E[asked.expert_ids_TK.flatten()[branch_N]] << _EXPERT_SHIFT
        code_N = code_N + starts_N * _STARTS_PAIR + refresh_N * _REFRESH + found_N * _FOUND
        gate_N = asked.gates_TK.flatten()[branch_N].float().view(torch.int32)
        row_N = asked.rows_TK.flatten()[branch_N]
        header_N3 = torch.stack([code_N.to(torch.int32), row_N.to(torch.int32), gate_N], 1)
        return header_N3, owner_N, token_N, starts_N, refresh_N


def _sizes(branches: Sequence[int], hidden: Sequence[int], like_HD: Tensor) -> list[int]:
    """Bytes per rank: its headers and hidden rows share one collective."""
    row_bytes = like_HD.shape[1] * like_HD.element_size()
    return [headers * HEADER_BYTES + rows * row_bytes for headers, rows in zip(branches, hidden, strict=True)]


def _packed(
    header_N3: Tensor, hidden_MD: Tensor, branches: Sequence[int], hidden: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """uint8: for each rank its headers, then its hidden rows; and the bytes per rank."""
    parts = []
    headers = header_N3.view(torch.uint8).split(list(branches))
    rows = hidden_MD.view(torch.uint8).split(list(hidden))
    for header, row in zip(headers, rows, strict=True):
        parts += [header.flatten(), row.flatten()]
    return torch.cat(parts), _sizes(branches, hidden, hidden_MD)


def _unpacked(
    arrived: Tensor, branches: Sequence[int], hidden: Sequence[int], like_HD: Tensor
) -> tuple[Tensor, Tensor]:
    """The inverse of ``_packed`` on the other side; concatenating also restores the alignment that views need."""
    row_bytes = like_HD.shape[1] * like_HD.element_size()
    sizes = [size for b, h in zip(branches, hidden, strict=True) for size in (b * HEADER_BYTES, h * row_bytes)]
    parts = arrived.split(sizes)
    header_R3 = torch.cat(parts[::2]).view(torch.int32).view(sum(branches), 3)
    return header_R3, torch.cat(parts[1::2]).view(like_HD.dtype).view(sum(hidden), like_HD.shape[1])


def _read(
    header_R3: Tensor, hidden_HD: Tensor, from_branches: Sequence[int], capacities: tuple[int, ...], plan: PairPlan
) -> ArrivedPairs:
    code_R, row_R, gate_R = header_R3.unbind(1)
    starts_R = (code_R & _STARTS_PAIR) != 0
    refresh_R = (code_R & _REFRESH) != 0
    pair_R = starts_R.cumsum(0) - 1
    starts_S = starts_R.nonzero().squeeze(1)
    hidden_S = torch.zeros_like(starts_S).index_fill_(0, pair_R[refresh_R], 1)
    homes = torch.arange(len(from_branches), device=code_R.device)
    return ArrivedPairs(
        hidden_HD=hidden_HD,
        hidden_row_R=(hidden_S.cumsum(0) - 1)[pair_R],
        home_R=homes.repeat_interleave(torch.tensor(from_branches, device=code_R.device)),
        starts_S=starts_S,
        local_expert_R=(code_R >> _EXPERT_SHIFT).long(),
        gates_R=gate_R.contiguous().view(torch.float32),
        refresh_R=refresh_R,
        found_R=(code_R & _FOUND) != 0,
        row_R=row_R.long(),
        capacities=capacities,
        plan=plan,
    )

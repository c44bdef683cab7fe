"""The exchange of placement ``owner``: headers and hidden rows to the owners, pre-summed rows back.

A token travels ("touched") if any of its branches is refreshed; then every owner of its experts gets a header that
names its branches, the owners where something is refreshed get the hidden row, once, and each owner returns one row:
the weighted sum of the branches it holds.

Shape suffixes: T tokens of this rank, K routed experts per token, D hidden size, E experts, P ranks of the group,
N branches sent, M pairs sent, H hidden rows received, R branches received, S pairs received.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.parallel.exchange import Exchange
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.wire import WORD_BYTES, Leg, Pairs, RowDtype, legs, paired, send, send_back

HEADER_BYTES = 3 * WORD_BYTES  # per branch: expert and flags, row, gate
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
class ArrivedPairs:
    """Branches that an owner is asked for, pair by pair, in the order of the home ranks.

    ``starts_S``: the first branch of each pair. ``hidden_row_R``: the hidden row of each branch, meaningful where it
    is refreshed. ``local_expert_R``: positions among the owner's experts. ``capacities``: rows that each home rank
    uses of this rank's cache. ``sent`` and ``leg``: this rank's own pairs as a home, and how many went where;
    ``payload`` is the same on all ranks.
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
    sent: Pairs
    leg: Leg
    payload: bool


class PairExchange:
    """Both legs over one group. All ranks agree on every size from the gathered counts, so also on whether to talk."""

    def __init__(self, exchange: Exchange, placement: ExpertPlacement, row_dtype: RowDtype = "exact") -> None:
        self.exchange = exchange
        self.row_dtype = row_dtype
        self.num_ranks = placement.num_ranks
        # As this rank's tokens see it: replicated experts are here.
        owners = placement.owners_for(exchange.rank)
        places = [{expert: i for i, expert in enumerate(placement.experts_of(rank))} for rank in range(self.num_ranks)]
        local_ids = [places[owner][expert] for expert, owner in enumerate(owners)]
        self.owner_of_expert_E = torch.tensor(owners, dtype=torch.int64)
        self.local_id_E = torch.tensor(local_ids, dtype=torch.int64)

    def owners(self, device: torch.device) -> Tensor:
        """The owner [E] of each expert, this rank where it is replicated.

        The tables move once, to wherever routing is computed.
        """
        self.owner_of_expert_E = self.owner_of_expert_E.to(device)
        self.local_id_E = self.local_id_E.to(device)
        return self.owner_of_expert_E

    def dispatch(self, x_TD: Tensor, asked: Asked, capacities: Sequence[int]) -> Pending[ArrivedPairs]:
        """``capacities``: rows that this rank uses of each rank's cache."""
        header_N3, pairs, hidden_M = self._headers(asked)
        device = header_N3.device
        # NOTE: a host synchronisation on CUDA: the number of hidden rows decides the shapes.
        hidden_H = hidden_M.nonzero().squeeze(1)
        token_H, owner_H = pairs.token_M.index_select(0, hidden_H), pairs.owner_M.index_select(0, hidden_H)
        hidden_P = torch.bincount(owner_H, minlength=self.num_ranks)
        counts = [*pairs.counts(self.num_ranks), hidden_P, torch.tensor(capacities, device=device)]
        gathered = self.exchange.gather_counts(torch.stack(counts).flatten())
        traffic_P4P = gathered.view(self.num_ranks, 4, self.num_ranks)
        branches, leg, hidden, wanted = legs(traffic_P4P, self.exchange.rank)
        payload = bool(traffic_P4P[:, 0].any())
        rows_HD = x_TD.index_select(0, token_H)
        mine = (pairs, leg, payload)
        coming = send(self.exchange, header_N3, rows_HD, branches, hidden, self.row_dtype, payload=payload)
        return coming.then(lambda arrived: _read(*arrived, branches.received, wanted.received, mine))

    def combine(self, sums_SD: Tensor, arrived: ArrivedPairs) -> Pending[Tensor]:
        """[S, D] sums at the owner -> [M, D] rows of this rank's pairs, in the order of ``sent.token_M``."""
        return send_back(self.exchange, sums_SD, arrived.leg, self.row_dtype, payload=arrived.payload)

    def _headers(self, asked: Asked) -> tuple[Tensor, Pairs, Tensor]:
        """Headers [N, 3] of the branches of touched tokens, their pairs, and bool [M]: whose hidden row is needed."""
        k = asked.refresh_TK.shape[1]
        owner_of_expert_E = self.owners(asked.refresh_TK.device)
        touched_T = asked.refresh_TK.any(1)
        # NOTE: a host synchronisation on CUDA: the number of touched tokens decides the shapes.
        branch_N = touched_T.repeat_interleave(k).nonzero().squeeze(1)
        pairs = paired(owner_of_expert_E[asked.expert_ids_TK.flatten()[branch_N]], branch_N // k)
        branch_N = branch_N[pairs.branch_N]
        refresh_N, found_N = asked.refresh_TK.flatten()[branch_N], asked.found_TK.flatten()[branch_N]
        pair_N = pairs.starts_N.cumsum(0) - 1
        hidden_M = torch.zeros_like(pairs.first_M, dtype=torch.bool).index_fill_(0, pair_N[refresh_N], True)
        code_N = self.local_id_E[asked.expert_ids_TK.flatten()[branch_N]] << _EXPERT_SHIFT
        code_N = code_N + pairs.starts_N * _STARTS_PAIR + refresh_N * _REFRESH + found_N * _FOUND
        gate_N = asked.gates_TK.flatten()[branch_N].float().view(torch.int32)
        row_N = asked.rows_TK.flatten()[branch_N]
        return torch.stack([code_N.to(torch.int32), row_N.to(torch.int32), gate_N], 1), pairs, hidden_M


def _read(
    header_R3: Tensor,
    hidden_HD: Tensor,
    from_branches: Sequence[int],
    capacities: tuple[int, ...],
    sent: tuple[Pairs, Leg, bool],
) -> ArrivedPairs:
    code_R, row_R, gate_R = header_R3.unbind(1)
    starts_R = (code_R & _STARTS_PAIR) != 0
    refresh_R = (code_R & _REFRESH) != 0
    pair_R = starts_R.cumsum(0) - 1
    starts_S = starts_R.nonzero().squeeze(1)
    hidden_S = torch.zeros_like(starts_S).index_fill_(0, pair_R[refresh_R], 1)
    homes = torch.arange(len(from_branches), device=code_R.device)
    pairs, leg, payload = sent
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
        sent=pairs,
        leg=leg,
        payload=payload,
    )

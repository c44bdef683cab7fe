"""The exchange with branch values at the owners: headers and hidden rows to them, summed rows back.

A token travels ("touched") if any of its branches is refreshed, or dropped by the routing. Then every owner of its
experts gets a header for each of its branches. Owners of refreshed branches get the hidden row too, once. Each owner
returns one row: the weighted sum of the branches that it holds.

    header: three int32 words of a branch
    word 0   | local expert: 29 bits | found: 1 | refresh: 1 | starts a pair: 1 |
    word 1   | slot in the owner's store                                       |
    word 2   | bits of the fp32 gate                                           |

Shape suffixes: T tokens of this rank, D hidden size, E experts, P ranks of the group, N branches sent, M pairs (of a
token and an owner) sent, H hidden rows sent or received, R branches received, S pairs received.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.parallel.collectives import Collectives, Handle
from moeca_dist.parallel.row_packing import (
    WORD_BYTES,
    ExpertOwners,
    RowDtype,
    Splits,
    TokenOwnerPairs,
    group_by_owner,
    send,
    send_back,
    splits_from_counts,
)
from moeca_dist.types import Routing

HEADER_BYTES = 3 * WORD_BYTES
_STARTS_PAIR, _REFRESH, _FOUND, _EXPERT_SHIFT = 1, 2, 4, 3


@dataclass(frozen=True)
class OwnerRequest:
    """The request of a home rank to the owners, for all its tokens.

    Attributes:
        touched_T: bool, tokens that travel: a branch is refreshed, or the routing dropped one. The others stay at home.
        refresh_N: bool, branches that are computed now.
        found_N: bool, branches that the owner holds.
        slot_N: int64 slot of each branch in its owner's store.
    """

    routing: Routing
    touched_T: Tensor
    refresh_N: Tensor
    found_N: Tensor
    slot_N: Tensor


@dataclass(frozen=True)
class ReceivedRequest:
    """Branches that an owner is asked for, pair by pair, in the order of the home ranks.

    Attributes:
        hidden_row_R: the hidden row of each branch, meaningful if it is refreshed.
        home_R: the home rank of each branch.
        starts_S: the first branch of each pair.
        local_expert_R: position of the expert among the owner's.
        slot_R: the slot of each branch in this rank's store, counted by its home.
        capacities: slots that each home rank uses of this rank's store.
        sent: this rank's own pairs as a home.
        per_pair: numbers of pairs to and from each rank.
        payload: whether any rank sends anything, the same on all of them.
    """

    hidden_HD: Tensor
    hidden_row_R: Tensor
    home_R: Tensor
    starts_S: Tensor
    local_expert_R: Tensor
    gates_R: Tensor
    refresh_R: Tensor
    found_R: Tensor
    slot_R: Tensor
    capacities: tuple[int, ...]
    sent: TokenOwnerPairs
    per_pair: Splits
    payload: bool


class OwnerExchange:
    """The exchange over one group, in both directions.

    All ranks know every size from the gathered counts. So they also agree on whether anything is sent.
    """

    def __init__(self, collectives: Collectives, owners: ExpertOwners, row_dtype: RowDtype) -> None:
        self.collectives = collectives
        self.owners = owners
        self.row_dtype: RowDtype = row_dtype

    def dispatch(self, x_TD: Tensor, request: OwnerRequest, capacities: Sequence[int]) -> Handle[ReceivedRequest]:
        """Send ``request`` with the hidden rows that it needs.

        Args:
            capacities: slots that this rank uses of each rank's store.
        """
        header_N3, pairs, hidden_M = self._headers(request)
        device = header_N3.device
        # NOTE: a host synchronisation on CUDA: the number of hidden rows decides the shapes.
        hidden_H = hidden_M.nonzero().squeeze(1)
        token_H, owner_H = pairs.token_M.index_select(0, hidden_H), pairs.owner_M.index_select(0, hidden_H)
        hidden_P = torch.bincount(owner_H, minlength=self.owners.num_ranks)
        counts = [*pairs.counts(self.owners.num_ranks), hidden_P, torch.tensor(capacities, device=device)]
        gathered = self.collectives.gather_counts(torch.stack(counts).flatten())
        counts_P4P = gathered.view(self.owners.num_ranks, 4, self.owners.num_ranks)
        branches, per_pair, hidden, wanted = splits_from_counts(counts_P4P, self.collectives.rank)
        payload = bool(counts_P4P[:, 0].any())
        rows_HD = x_TD.index_select(0, token_H)
        sending = send(self.collectives, header_N3, rows_HD, branches, hidden, self.row_dtype, payload=payload)
        return sending.then(lambda arrived: _read(*arrived, branches.output, wanted.output, pairs, per_pair, payload))

    def combine(self, sums_SD: Tensor, received: ReceivedRequest) -> Handle[Tensor]:
        """Return the owners' sums [S, D] as rows [M, D] of this rank's pairs, in the order of ``sent.token_M``."""
        return send_back(self.collectives, sums_SD, received.per_pair, self.row_dtype, payload=received.payload)

    def _headers(self, request: OwnerRequest) -> tuple[Tensor, TokenOwnerPairs, Tensor]:
        """Return headers [N, 3] of touched tokens' branches, their pairs, and bool [M]: whose hidden row is needed."""
        routing = request.routing
        owner_E, local_id_E = self.owners.on(routing.token_N.device)
        # NOTE: a host synchronisation on CUDA: the number of branches of touched tokens decides the shapes.
        branch_N = request.touched_T.index_select(0, routing.token_N).nonzero().squeeze(1)
        pairs = group_by_owner(owner_E[routing.expert_N[branch_N]], routing.token_N[branch_N])
        branch_N = branch_N[pairs.branch_N]
        refresh_N, found_N = request.refresh_N[branch_N], request.found_N[branch_N]
        pair_N = pairs.starts_N.cumsum(0) - 1
        hidden_M = torch.zeros_like(pairs.first_M, dtype=torch.bool).index_fill_(0, pair_N[refresh_N], True)
        code_N = local_id_E[routing.expert_N[branch_N]] << _EXPERT_SHIFT
        code_N = code_N + pairs.starts_N * _STARTS_PAIR + refresh_N * _REFRESH + found_N * _FOUND
        gate_N = routing.gate_N[branch_N].float().view(torch.int32)
        slot_N = request.slot_N[branch_N]
        return torch.stack([code_N.to(torch.int32), slot_N.to(torch.int32), gate_N], 1), pairs, hidden_M


def _read(
    header_R3: Tensor,
    hidden_HD: Tensor,
    from_branches: Sequence[int],
    capacities: tuple[int, ...],
    sent: TokenOwnerPairs,
    per_pair: Splits,
    payload: bool,
) -> ReceivedRequest:
    code_R, slot_R, gate_R = header_R3.unbind(1)
    starts_R = (code_R & _STARTS_PAIR) != 0
    refresh_R = (code_R & _REFRESH) != 0
    pair_R = starts_R.cumsum(0) - 1
    starts_S = starts_R.nonzero().squeeze(1)
    hidden_S = torch.zeros_like(starts_S).index_fill_(0, pair_R[refresh_R], 1)
    homes = torch.arange(len(from_branches), device=code_R.device)
    return ReceivedRequest(
        hidden_HD=hidden_HD,
        hidden_row_R=(hidden_S.cumsum(0) - 1)[pair_R],
        home_R=homes.repeat_interleave(torch.tensor(from_branches, device=code_R.device)),
        starts_S=starts_S,
        local_expert_R=(code_R >> _EXPERT_SHIFT).long(),
        gates_R=gate_R.contiguous().view(torch.float32),
        refresh_R=refresh_R,
        found_R=(code_R & _FOUND) != 0,
        slot_R=slot_R.long(),
        capacities=capacities,
        sent=sent,
        per_pair=per_pair,
        payload=payload,
    )

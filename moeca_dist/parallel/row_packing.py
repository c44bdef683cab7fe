"""The layout of messages between ranks: a header for each branch, and the hidden row once per pair.

A pair is a token and a rank that owns some of its experts. The headers of all branches and the hidden rows of the pairs
share one collective. A row for each pair, or for each branch, comes back. Rows to other ranks travel in the row dtype
of the exchange. Rows of a rank to itself stay exact.

Shape suffixes: T tokens of this rank, D hidden size, P ranks of the group, N branches sent, M pairs sent, H hidden rows
sent or received, R branches received, S pairs received, W words of a header.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.int8_rows import decode_rows, encode_rows
from moeca_dist.parallel.collectives import Collectives, Handle
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.types import positions

WORD_BYTES = 4
RowDtype = Literal["exact", "int8"]
"""How rows travel between ranks: as computed, or as int8 codes with one scale each."""


class ExpertOwners:
    """Tables of the rank that owns each expert, and of its position there. They are on the device of the routing."""

    def __init__(self, placement: ExpertPlacement, rank: int) -> None:
        """Read the tables off ``placement`` as this ``rank``'s tokens see it: replicated experts are here."""
        self.num_ranks = placement.num_ranks
        owners = placement.owners_for(rank)
        places = [{expert: i for i, expert in enumerate(placement.experts_of(p))} for p in range(self.num_ranks)]
        self._owner_E = torch.tensor(owners, dtype=torch.int64)
        self._local_id_E = torch.tensor([places[owner][expert] for expert, owner in enumerate(owners)])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return int64 [E] owners, and int64 [E] positions among the owner's experts. They move once."""
        self._owner_E, self._local_id_E = self._owner_E.to(device), self._local_id_E.to(device)
        return self._owner_E, self._local_id_E


@dataclass(frozen=True)
class TokenOwnerPairs:
    """Branches by (owner, token), and the pairs of a token and an owner that they make up.

    Attributes:
        branch_N: the branch at each position.
        owner_N: its owner.
        starts_N: bool, whether a pair begins there.
        first_M: the first position of each pair.
        token_M, owner_M: token and owner of each pair.
    """

    branch_N: Tensor
    owner_N: Tensor
    starts_N: Tensor
    first_M: Tensor
    token_M: Tensor
    owner_M: Tensor

    def counts(self, num_ranks: int) -> Tensor:
        """Return int64 [2, P]: branches and pairs of each owner."""
        return torch.stack([torch.bincount(owner, minlength=num_ranks) for owner in (self.owner_N, self.owner_M)])


def group_by_owner(owner_N: Tensor, token_N: Tensor) -> TokenOwnerPairs:
    """Group branches, given in the order of their tokens."""
    owner_N, branch_N = owner_N.sort(stable=True)
    token_N = token_N.index_select(0, branch_N)
    starts_N = torch.ones_like(token_N, dtype=torch.bool)
    starts_N[1:] = (token_N[1:] != token_N[:-1]) | (owner_N[1:] != owner_N[:-1])
    first_M = positions(starts_N)
    token_M, owner_M = token_N.index_select(0, first_M), owner_N.index_select(0, first_M)
    return TokenOwnerPairs(branch_N, owner_N, starts_N, first_M, token_M, owner_M)


def pair_sums(row_R: Tensor, values: Tensor, starts_S: Tensor, gates_R: Tensor) -> Tensor:
    """Return [S, D]: the sum of gate x ``values[row]`` over consecutive branches, from each start to the next."""
    if not starts_S.shape[0]:
        return values.new_zeros(0, values.shape[1])
    return F.embedding_bag(row_R, values, starts_S, mode="sum", per_sample_weights=gates_R.to(values.dtype))


def token_sums(rows_MD: Tensor, token_M: Tensor, num_tokens: int) -> Tensor:
    """Return [T, D]: the rows of each token's pairs added in the order of their owners.

    Tokens without pairs get zero.

    The order is the same for owners and home, so their sums are equal bit for bit.
    """
    if not token_M.shape[0]:
        return rows_MD.new_zeros(num_tokens, rows_MD.shape[1])
    pairs_T = torch.bincount(token_M, minlength=num_tokens)
    return F.embedding_bag(token_M.argsort(stable=True), rows_MD, pairs_T.cumsum(0) - pairs_T, mode="sum")


@dataclass(frozen=True)
class Splits:
    """The numbers of things that this rank sends to each rank, and receives from each."""

    input: tuple[int, ...]
    output: tuple[int, ...]

    def between_others(self, rank: int) -> "Splits":
        """Return the splits of this ``rank`` without what it sends to itself."""
        sent, received = list(self.input), list(self.output)
        sent[rank] = received[rank] = 0
        return Splits(tuple(sent), tuple(received))


def splits_from_counts(counts_PCP: Tensor, rank: int) -> list[Splits]:
    """Return the splits of each of the C kinds of things that all ranks have counted: ``counts[from, kind, to]``."""
    sent, received = counts_PCP[rank].tolist(), counts_PCP[:, :, rank].T.tolist()
    return [Splits(tuple(there), tuple(here)) for there, here in zip(sent, received, strict=True)]


def send(
    collectives: Collectives,
    header_NW: Tensor,
    rows_HD: Tensor,
    branches: Splits,
    hidden: Splits,
    row_dtype: RowDtype,
    *,
    payload: bool,
) -> Handle[tuple[Tensor, Tensor]]:
    """Send int32 headers and hidden rows of this rank's branches.

    Args:
        branches, hidden: numbers of headers and of hidden rows.
        payload: whether any rank sends anything, the same on all of them. If not, no collective is issued.

    Returns:
        Headers and hidden rows that arrive, by home rank.
    """
    if not payload:
        collectives.count_skipped()
        return Handle.ready((header_NW, rows_HD))
    if row_dtype == "exact":
        return _send_packed(collectives, header_NW, rows_HD, branches, hidden)
    rank = collectives.rank
    own_ND, coded = _own(rows_HD, hidden.input, rank), encode_rows(_others(rows_HD, hidden.input, rank))
    sending = _send_packed(collectives, header_NW, coded, branches, hidden.between_others(rank))
    return sending.then(
        lambda arrived: (arrived[0], _joined(own_ND, decode_rows(arrived[1], rows_HD.dtype), hidden.output, rank))
    )


def send_back(
    collectives: Collectives, rows: Tensor, splits: Splits, row_dtype: RowDtype, *, payload: bool
) -> Handle[Tensor]:
    """Send back one row for each thing that ``splits`` brought here.

    Returns:
        The rows that come back, one for each thing that this rank had sent.
    """
    if not payload:
        collectives.count_skipped()
        return Handle.ready(rows)
    if row_dtype == "exact":
        return collectives.all_to_all_async(rows, splits.output, splits.input)
    rank, away = collectives.rank, splits.between_others(collectives.rank)
    own_ND, coded = _own(rows, splits.output, rank), encode_rows(_others(rows, splits.output, rank))
    coming = collectives.all_to_all_async(coded, away.output, away.input)
    return coming.then(lambda arrived: _joined(own_ND, decode_rows(arrived, rows.dtype), splits.input, rank))


def _others(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Return the rows of all ranks but this one, from rows grouped by rank."""
    start = sum(counts[:rank])
    return torch.cat([rows[:start], rows[start + counts[rank] :]])


def _own(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Return the rows of this rank, from rows grouped by rank."""
    return rows.narrow(0, sum(counts[:rank]), counts[rank])


def _joined(own_rows: Tensor, others_rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Undo ``_own`` and ``_others``."""
    start = sum(counts[:rank])
    return torch.cat([others_rows[:start], own_rows, others_rows[start:]])


def _send_packed(
    collectives: Collectives, header_NW: Tensor, rows_HD: Tensor, branches: Splits, hidden: Splits
) -> Handle[tuple[Tensor, Tensor]]:
    """Send one message to each rank: its headers, then its hidden rows, as bytes."""
    header_bytes, row_bytes = header_NW.shape[1] * WORD_BYTES, rows_HD.shape[1] * rows_HD.element_size()
    sent = [b * header_bytes + h * row_bytes for b, h in zip(branches.input, hidden.input, strict=True)]
    received = [b * header_bytes + h * row_bytes for b, h in zip(branches.output, hidden.output, strict=True)]
    packed = _packed(header_NW, rows_HD, branches.input, hidden.input)
    sending = collectives.all_to_all_async(packed[:, None], sent, received)
    return sending.then(
        lambda bytes_N1: _unpacked(bytes_N1.squeeze(1), header_NW, rows_HD, branches.output, hidden.output)
    )


def _packed(header_NW: Tensor, rows_HD: Tensor, branches: Sequence[int], hidden: Sequence[int]) -> Tensor:
    """Return uint8: for each rank its headers, then its hidden rows."""
    headers = header_NW.view(torch.uint8).split(list(branches))
    rows = rows_HD.view(torch.uint8).split(list(hidden))
    return torch.cat([part.flatten() for pair in zip(headers, rows, strict=True) for part in pair])


def _unpacked(
    arrived: Tensor, like_NW: Tensor, like_HD: Tensor, branches: Sequence[int], hidden: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Undo ``_packed`` on the other side. Concatenating also restores the alignment that views need."""
    words, width = like_NW.shape[1], like_HD.shape[1]
    row_bytes = width * like_HD.element_size()
    sizes = [size for b, h in zip(branches, hidden, strict=True) for size in (b * words * WORD_BYTES, h * row_bytes)]
    parts = arrived.split(sizes)
    header_RW = torch.cat(parts[::2]).view(torch.int32).view(sum(branches), words)
    return header_RW, torch.cat(parts[1::2]).view(like_HD.dtype).view(sum(hidden), width)

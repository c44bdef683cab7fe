"""Branches on their way to the owners of their experts: a header for each, and the hidden row once per pair.

A pair is a token and a rank that owns some of its experts. The headers of all branches and the hidden rows of the pairs
share one collective; a row for each pair, or for each branch, comes back. Rows to other ranks travel in the row dtype
of the exchange; rows of a rank to itself stay exact.

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
from moeca_dist.parallel.exchange import Exchange
from moeca_dist.parallel.pending import Pending
from moeca_dist.types import positions

WORD_BYTES = 4
RowDtype = Literal["exact", "int8"]
"""How rows travel between ranks: as computed, or as int8 codes with one scale each."""


@dataclass(frozen=True)
class Pairs:
    """Branches by (owner, token, slot), and the pairs that they make up.

    ``branch_N``: which branch stands at each position. ``first_M``: where the branches of each pair begin.
    """

    branch_N: Tensor
    owner_N: Tensor
    token_N: Tensor
    starts_N: Tensor
    first_M: Tensor

    @property
    def token_M(self) -> Tensor:
        return self.token_N.index_select(0, self.first_M)

    @property
    def owner_M(self) -> Tensor:
        return self.owner_N.index_select(0, self.first_M)

    def counts(self, num_ranks: int) -> Tensor:
        """int64 [2, P]: branches and pairs of each owner."""
        return torch.stack([torch.bincount(owner, minlength=num_ranks) for owner in (self.owner_N, self.owner_M)])


def paired(owner_N: Tensor, token_N: Tensor) -> Pairs:
    """Group branches, given in the order of their tokens."""
    owner_N, branch_N = owner_N.sort(stable=True)
    token_N = token_N.index_select(0, branch_N)
    starts_N = torch.ones_like(token_N, dtype=torch.bool)
    starts_N[1:] = (token_N[1:] != token_N[:-1]) | (owner_N[1:] != owner_N[:-1])
    return Pairs(branch_N, owner_N, token_N, starts_N, positions(starts_N))


def pair_sums(row_R: Tensor, values: Tensor, starts_S: Tensor, gates_R: Tensor) -> Tensor:
    """[S, D]: sum of gate x ``values[row]`` over consecutive branches, from each start to the next, in their order."""
    if not starts_S.shape[0]:
        return values.new_zeros(0, values.shape[1])
    return F.embedding_bag(row_R, values, starts_S, mode="sum", per_sample_weights=gates_R.to(values.dtype))


def token_sums(rows_MD: Tensor, token_M: Tensor, num_tokens: int) -> Tensor:
    """[T, D]: the rows of each token's pairs added in the order of their owners; zero where there are none.

    One order for all: whoever makes the pairs' rows, the owners or home, the sums are the same bit for bit.
    """
    if not token_M.shape[0]:
        return rows_MD.new_zeros(num_tokens, rows_MD.shape[1])
    pairs_T = torch.bincount(token_M, minlength=num_tokens)
    return F.embedding_bag(token_M.argsort(stable=True), rows_MD, pairs_T.cumsum(0) - pairs_T, mode="sum")


@dataclass(frozen=True)
class Leg:
    """How many of something this rank sends to each rank, and receives from each."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> "Leg":
        return Leg(self.received, self.sent)

    def between_others(self, rank: int) -> "Leg":
        """Without what ``rank``, whose leg it is, sends to itself."""
        sent, received = list(self.sent), list(self.received)
        sent[rank] = received[rank] = 0
        return Leg(tuple(sent), tuple(received))


def legs(traffic_PCP: Tensor, rank: int) -> list[Leg]:
    """One leg for each of the C kinds of things that all ranks have counted: [from, kind, to]."""
    sent, received = traffic_PCP[rank].tolist(), traffic_PCP[:, :, rank].T.tolist()
    return [Leg(tuple(there), tuple(here)) for there, here in zip(sent, received, strict=True)]


def send(
    exchange: Exchange,
    header_NW: Tensor,
    rows_HD: Tensor,
    branches: Leg,
    hidden: Leg,
    row_dtype: RowDtype,
    *,
    payload: bool,
) -> Pending[tuple[Tensor, Tensor]]:
    """Headers (int32) and hidden rows of this rank's branches -> those that arrive, in the order of the home ranks.

    Without ``payload``, which is the same on all ranks, nobody sends anything.
    """
    if not payload:
        exchange.elide()
        return Pending.ready((header_NW, rows_HD))
    if row_dtype == "exact":
        return _send_packed(exchange, header_NW, rows_HD, branches, hidden)
    rank = exchange.rank
    own_ND, coded = _own(rows_HD, hidden.sent, rank), encode_rows(_others(rows_HD, hidden.sent, rank))
    coming = _send_packed(exchange, header_NW, coded, branches, hidden.between_others(rank))
    return coming.then(
        lambda arrived: (arrived[0], _joined(own_ND, decode_rows(arrived[1], rows_HD.dtype), hidden.received, rank))
    )


def send_back(exchange: Exchange, rows: Tensor, leg: Leg, row_dtype: RowDtype, *, payload: bool) -> Pending[Tensor]:
    """One row for each thing that ``leg`` brought here, back to where it came from."""
    if not payload:
        exchange.elide()
        return Pending.ready(rows)
    if row_dtype == "exact":
        return exchange.start_rows(rows, leg.received, leg.sent)
    rank, away = exchange.rank, leg.between_others(exchange.rank)
    own_ND, coded = _own(rows, leg.received, rank), encode_rows(_others(rows, leg.received, rank))
    coming = exchange.start_rows(coded, away.received, away.sent)
    return coming.then(lambda arrived: _joined(own_ND, decode_rows(arrived, rows.dtype), leg.sent, rank))


def _others(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Of rows grouped by rank, return those of all ranks but this one."""
    start = sum(counts[:rank])
    return torch.cat([rows[:start], rows[start + counts[rank] :]])


def _own(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Of rows grouped by rank, return those of this one."""
    return rows.narrow(0, sum(counts[:rank]), counts[rank])


def _joined(own_rows: Tensor, others_rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Undo ``_own`` and ``_others``."""
    start = sum(counts[:rank])
    return torch.cat([others_rows[:start], own_rows, others_rows[start:]])


def _send_packed(
    exchange: Exchange, header_NW: Tensor, rows_HD: Tensor, branches: Leg, hidden: Leg
) -> Pending[tuple[Tensor, Tensor]]:
    packed = _packed(header_NW, rows_HD, branches.sent, hidden.sent)
    header_bytes, row_bytes = _widths(header_NW, rows_HD)
    sent = _sizes(branches.sent, hidden.sent, header_bytes, row_bytes)
    received = _sizes(branches.received, hidden.received, header_bytes, row_bytes)
    arriving = exchange.start_rows(packed[:, None], sent, received)
    return arriving.then(
        lambda bytes_N1: _unpacked(bytes_N1.squeeze(1), header_NW, rows_HD, branches.received, hidden.received)
    )


def _widths(header_NW: Tensor, rows_HD: Tensor) -> tuple[int, int]:
    return header_NW.shape[1] * WORD_BYTES, rows_HD.shape[1] * rows_HD.element_size()


def _sizes(branches: Sequence[int], hidden: Sequence[int], header_bytes: int, row_bytes: int) -> list[int]:
    """Bytes per rank."""
    return [headers * header_bytes + rows * row_bytes for headers, rows in zip(branches, hidden, strict=True)]


def _packed(header_NW: Tensor, rows_HD: Tensor, branches: Sequence[int], hidden: Sequence[int]) -> Tensor:
    """uint8: for each rank its headers, then its hidden rows."""
    parts = []
    headers = header_NW.view(torch.uint8).split(list(branches))
    rows = rows_HD.view(torch.uint8).split(list(hidden))
    for header, row in zip(headers, rows, strict=True):
        parts += [header.flatten(), row.flatten()]
    return torch.cat(parts)


def _unpacked(
    arrived: Tensor, like_NW: Tensor, like_HD: Tensor, branches: Sequence[int], hidden: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The inverse of ``_packed`` on the other side; concatenating also restores the alignment that views need."""
    header_bytes, row_bytes = _widths(like_NW, like_HD)
    sizes = [size for b, h in zip(branches, hidden, strict=True) for size in (b * header_bytes, h * row_bytes)]
    parts = arrived.split(sizes)
    header_RW = torch.cat(parts[::2]).view(torch.int32).view(sum(branches), like_NW.shape[1])
    return header_RW, torch.cat(parts[1::2]).view(like_HD.dtype).view(sum(hidden), like_HD.shape[1])

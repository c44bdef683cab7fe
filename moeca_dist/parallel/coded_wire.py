"""The two legs of an exchange with coded rows: as in ``wire.py``, but rows to other ranks travel as codes.

Rows of a rank to itself do not travel and stay as they are.

Shape suffixes: D hidden size, N branches sent, H hidden rows sent or received (one for each of some pairs), M pairs
sent, S pairs received, W bytes of a coded row; and W words of a header.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_dist.kernels.select import kernels_for
from moeca_dist.parallel.collectives import Exchange
from moeca_dist.parallel.handle import Pending
from moeca_dist.parallel.references import BlockCoding
from moeca_dist.parallel.row_packing import WORD_BYTES, Leg, Pairs, send

KEY_BYTES = WORD_BYTES  # where the owner finds the pair's references


@dataclass(frozen=True)
class CodedPairs:
    """What the way back needs: where the references of the pairs with other ranks lie.

    ``home_M``: of those that this rank sent, at home; ``owner_S``: of those that it received.
    """

    coding: BlockCoding
    home_M: Tensor
    owner_S: Tensor

    def branches_back(self, exchange: Exchange, rows: Tensor, leg: Leg) -> Pending[Tensor]:
        """One row for each branch that ``leg`` brought here, coded by itself: home has many of them for a pair."""
        form, width, dtype, kernels = self.coding.form, rows.shape[1], rows.dtype, kernels_for(rows.device)
        return _send_back(
            exchange,
            rows,
            leg,
            lambda others: kernels.encode_rows(others, None, form),
            lambda coded: kernels.decode_rows(coded, None, form, width, dtype),
        )

    def sums_back(self, exchange: Exchange, sums_SD: Tensor, leg: Leg) -> Pending[Tensor]:
        """One row for each pair that ``leg`` brought here, as the change of what home holds."""
        references, width, dtype = self.coding.references, sums_SD.shape[1], sums_SD.dtype
        return _send_back(
            exchange,
            sums_SD,
            leg,
            lambda others_SD: references.sums_at_owner.encode(others_SD, self.owner_S),
            lambda coded_MW: references.sums_at_home.decode(coded_MW, self.home_M, width, dtype),
        )


def send_pairs(
    exchange: Exchange, header_NW: Tensor, rows_MD: Tensor, pairs: Pairs, branches: Leg, leg: Leg, coding: BlockCoding
) -> Pending[tuple[Tensor, Tensor, CodedPairs]]:
    """Headers of all branches, and a hidden row with its key for each pair -> those that arrive, rows decoded."""
    token_M, owner_M = (others(of_M, leg.sent, exchange.rank) for of_M in (pairs.token_M, pairs.owner_M))
    key_M1 = coding.owner_keys(token_M, owner_M)[:, None]
    sending = HiddenRows(exchange.rank, rows_MD, leg, coding.home_keys(token_M, owner_M), coding)
    packed = torch.cat([key_M1.view(torch.uint8), sending.encode()], 1)
    arriving = send(exchange, header_NW, packed, branches, leg.between_others(exchange.rank), payload=True)

    def arrived(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, CodedPairs]:
        header_RW, packed = parts
        owner_S = packed[:, :KEY_BYTES].flatten().view(torch.int32).long()
        hidden_SD = sending.decode(packed[:, KEY_BYTES:], owner_S)
        return header_RW, hidden_SD, CodedPairs(coding, sending.home_M, owner_S)

    return arriving.then(arrived)


@dataclass(frozen=True)
class HiddenRows:
    """Hidden rows of this rank's pairs, grouped by owner; ``home_M``: keys of those that go to other ranks."""

    rank: int
    rows_HD: Tensor
    leg: Leg
    home_M: Tensor
    coding: BlockCoding

    def encode(self) -> Tensor:
        """uint8 [., W]: those that go to other ranks."""
        to_others = others(self.rows_HD, self.leg.sent, self.rank)
        return self.coding.references.hidden_at_home.encode(to_others, self.home_M)

    def decode(self, coded: Tensor, owner_S: Tensor) -> Tensor:
        """[H, D]: what came from other ranks, with its keys, and this rank's own rows in their place."""
        references, width = self.coding.references.hidden_at_owner, self.rows_HD.shape[1]
        from_others = references.decode(coded, owner_S, width, self.rows_HD.dtype)
        mine = own(self.rows_HD, self.leg.sent, self.rank)
        return joined(mine, from_others, self.leg.received, self.rank)


def others(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Of rows grouped by rank, those of all ranks but this one."""
    start = sum(counts[:rank])
    return torch.cat([rows[:start], rows[start + counts[rank] :]])


def own(rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    return rows.narrow(0, sum(counts[:rank]), counts[rank])


def joined(own_rows: Tensor, others_rows: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """The inverse of ``own`` and ``others``."""
    start = sum(counts[:rank])
    return torch.cat([others_rows[:start], own_rows, others_rows[start:]])


def _send_back(
    exchange: Exchange,
    rows: Tensor,
    leg: Leg,
    encoded: Callable[[Tensor], Tensor],
    decoded: Callable[[Tensor], Tensor],
) -> Pending[Tensor]:
    rank = exchange.rank
    mine, away = own(rows, leg.received, rank), leg.between_others(rank)
    coming = exchange.start_rows(encoded(others(rows, leg.received, rank)), away.received, away.sent)
    return coming.then(lambda coded: joined(mine, decoded(coded), leg.sent, rank))

"""What one exchange of a MoE layer moves and computes, counted from its routing: the bytes that the exchange sends.

It follows the rules of ``parallel/all_to_all.py`` and ``parallel/owner_exchange.py``, without tensors on their way. A
hidden row travels once per pair (a token and a rank that owns some of its experts), a header per branch. What a rank
sends to itself is left out.

Shape suffixes: T tokens of all ranks, K routed experts per token, E experts, P ranks as homes, O owners.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeca_dist.kernels.int8_rows import SCALE_BYTES
from moeca_dist.parallel.all_to_all import BRANCH_HEADER_BYTES, SUM_HEADER_BYTES
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.owner_exchange import HEADER_BYTES

Returns = Literal["sums", "branches", "owner"]
"""What comes back: sums per pair (nothing is kept), single branches (kept at home), or sums of what owners keep."""


@dataclass(frozen=True)
class RowBytes:
    """Of one row on its way to an owner, and on its way back."""

    there: int
    back: int

    @classmethod
    def exact(cls, row_bytes: int) -> "RowBytes":
        """Rows as they are, of so many bytes."""
        return cls(row_bytes, row_bytes)

    @classmethod
    def int8(cls, width: int) -> "RowBytes":
        """Rows of so many values as int8 codes."""
        return cls(SCALE_BYTES + width, SCALE_BYTES + width)


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes ``there_PO`` from homes to owners and ``back_PO`` from owners to homes, by pair of ranks.

    ``owners_O``: the rank of each column; ranks without experts have none. ``rows_PE``: branches computed, by rank and
    expert.
    """

    there_PO: NDArray[np.int64]
    back_PO: NDArray[np.int64]
    owners_O: NDArray[np.int64]
    rows_PE: NDArray[np.int64]

    @property
    def bytes_sent(self) -> int:
        """Of all ranks together, as ``Traffic.bytes_sent`` counts them."""
        return int(self.there_PO.sum() + self.back_PO.sum())


def layer_traffic(
    expert_ids_TK: NDArray[np.integer],
    refreshed_TK: NDArray[np.bool_],
    home_T: NDArray[np.integer],
    placement: ExpertPlacement,
    row: RowBytes,
    returns: Returns,
) -> LayerTraffic:
    """One layer in one step, of all ranks of a group together; ``home_T``: the rank of each token."""
    owner_TK = np.array(placement.owner_of_expert)[expert_ids_TK]
    if placement.replicated:
        owner_TK = np.where(np.isin(expert_ids_TK, placement.replicated), home_T[:, None], owner_TK)
    owners_O = np.unique(placement.owner_of_expert if not placement.replicated else np.arange(placement.num_ranks))
    column_TK = np.searchsorted(owners_O, owner_TK)
    shape = placement.num_ranks, len(owners_O)
    sent_TK = refreshed_TK
    if returns == "owner":
        sent_TK = np.repeat(np.any(refreshed_TK, axis=1, keepdims=True), refreshed_TK.shape[1], axis=1)
    branches_PO = _branches(column_TK, sent_TK, home_T, shape)
    hidden_PO = _pairs(column_TK, refreshed_TK, home_T, shape)
    answers_PO = hidden_PO if returns != "owner" else _pairs(column_TK, sent_TK, home_T, shape)
    header = {"sums": SUM_HEADER_BYTES, "branches": BRANCH_HEADER_BYTES, "owner": HEADER_BYTES}[returns]
    away_PO = owners_O[None, :] != np.arange(placement.num_ranks)[:, None]
    back_PO = (branches_PO if returns == "branches" else answers_PO) * row.back
    cell_N = (owner_TK * placement.num_experts + expert_ids_TK)[refreshed_TK]
    rows = np.bincount(cell_N, minlength=placement.num_ranks * placement.num_experts)
    return LayerTraffic(
        (branches_PO * header + hidden_PO * row.there) * away_PO,
        back_PO * away_PO,
        owners_O,
        rows.reshape(placement.num_ranks, placement.num_experts),
    )


def _branches(
    column_TK: NDArray[np.integer], sent_TK: NDArray[np.bool_], home_T: NDArray[np.integer], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """[P, O]: branches by home and owner."""
    cell_N = (home_T[:, None] * shape[1] + column_TK)[sent_TK]
    return np.bincount(cell_N, minlength=shape[0] * shape[1]).reshape(shape)


def _pairs(
    column_TK: NDArray[np.integer], sent_TK: NDArray[np.bool_], home_T: NDArray[np.integer], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """[P, O]: tokens with at least one branch at the owner."""
    # Slots of a token at one owner count once: sorted, equal neighbours are dropped.
    sorted_TK = np.sort(np.where(sent_TK, column_TK, -1), axis=1)
    first_TK = sorted_TK >= 0
    first_TK[:, 1:] &= sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return _branches(sorted_TK, first_TK, home_T, shape)

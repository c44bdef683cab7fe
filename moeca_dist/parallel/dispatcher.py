"""Branches made into rows for experts, and their outputs brought home: the interface, and the case without ranks.

A dispatcher turns branches (tokens and the experts that they go to) into rows grouped by local expert. It brings the
expert outputs home: branch by branch if they are kept there, else summed up. Both ways are only started, so that the
caller can compute meanwhile what does not depend on the rows. What the way back needs travels in the frozen
``DispatchedRows``.

Shape suffixes: T tokens of this rank, D hidden size, L experts held here, N branches of this rank, R rows received and
computed here, S pairs (of a token and an owner) received.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.types import Kernels
from moeca_dist.parallel.collectives import Handle
from moeca_dist.parallel.row_packing import RowDtype, Splits, TokenOwnerPairs
from moeca_dist.types import Branches, Routing


@dataclass(frozen=True)
class RowPlan:
    """The ways of the branches of one dispatch: this rank's ``pairs``, and what it was sent as an owner.

    Attributes:
        per_branch, per_pair: numbers of branches and of pairs to and from each rank.
        payload: whether any rank of the group sends anything, the same on all of them.
        starts_S: the first received branch of each pair.
        gates_R: gates of the received branches. None if branches return one by one.
    """

    pairs: TokenOwnerPairs
    per_branch: Splits
    per_pair: Splits
    payload: bool
    starts_S: Tensor
    gates_R: Tensor | None


@dataclass(frozen=True)
class DispatchedRows:
    """Hidden rows grouped by local expert, with what combine needs to bring the outputs home.

    Attributes:
        slot_of_branch_N: position of each branch among the rows that combine returns.
        row_of_received_R: for each received branch, its row.
        plan: None if all experts are here.
    """

    rows_RD: Tensor
    rows_per_expert_L: Tensor
    slot_of_branch_N: Tensor
    row_of_received_R: Tensor
    plan: RowPlan | None = None


class Dispatcher(Protocol):
    """The interface of the exchange for a MoE layer.

    Attributes:
        row_dtype: how rows travel between ranks.
    """

    row_dtype: RowDtype
    kernels: Kernels

    def arranged(self, row_dtype: RowDtype, kernels: Kernels) -> "Dispatcher":
        """Return a dispatcher of the same experts whose rows travel as ``row_dtype``, with ``kernels``."""
        ...

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        """Count what the exact path would send for ``routing``. Called once in every evaluation of the router."""
        ...

    def dispatch(self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None = None) -> Handle[DispatchedRows]:
        """Send hidden rows of ``branches`` to their experts. With ``gates_N`` the owners return weighted sums."""
        ...

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Handle[Tensor]:
        """Return expert outputs [R, D] as outputs [N, D] of this rank's branches, ordered as ``slot_of_branch_N``."""
        ...

    def combine_sums(self, outputs_RD: Tensor, dispatched: DispatchedRows, routing: Routing) -> Handle[Tensor]:
        """Return weighted sums [T, D] of all branches of ``routing``, which were dispatched with their gates."""
        ...

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        """Return what ``combine_sums`` does, bit for bit, from all branches as ``combine`` returned them."""
        ...


class LocalDispatcher:
    """The dispatcher of a rank that holds all experts. It orders the rows by expert, and nothing travels."""

    def __init__(self, num_experts: int, row_dtype: RowDtype = "exact", kernels: Kernels = REFERENCE) -> None:
        self.num_experts = num_experts
        self.row_dtype: RowDtype = row_dtype
        self.kernels = kernels

    def arranged(self, row_dtype: RowDtype, kernels: Kernels) -> "LocalDispatcher":
        return LocalDispatcher(self.num_experts, row_dtype, kernels)

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        pass  # nothing travels

    def dispatch(self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None = None) -> Handle[DispatchedRows]:
        rows = self.kernels.gather_rows(x_TD, branches.token_N, branches.expert_N, self.num_experts)
        return Handle.ready(DispatchedRows(rows.rows_RD, rows.counts_L, rows.position_R, rows.position_R))

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Handle[Tensor]:
        return Handle.ready(outputs_RD)

    def combine_sums(self, outputs_RD: Tensor, dispatched: DispatchedRows, routing: Routing) -> Handle[Tensor]:
        return Handle.ready(self.weighted_sum(outputs_RD, dispatched, routing))

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        """Add a token's branches in their order, without materialising weighted rows."""
        gates_N = routing.gate_N.to(rows_ND.dtype)
        return F.embedding_bag(
            dispatched.slot_of_branch_N, rows_ND, routing.start_T, per_sample_weights=gates_N, mode="sum"
        )

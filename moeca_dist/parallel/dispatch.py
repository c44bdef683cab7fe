"""Branches made into rows for experts, and their outputs brought home: the interface, and the case without ranks.

A dispatcher turns branches (tokens and the experts that they go to) into rows grouped by local expert, and brings the
expert outputs home: branch by branch where they are kept there, else summed up. Both ways are only started, so that the
caller can compute meanwhile what does not depend on the rows. What the way back needs travels in the frozen
``DispatchedRows``.

Shape suffixes: T tokens of this rank, K routed experts per token, D hidden size, L experts held here, N branches of
this rank, M pairs of a token of this rank and an owner, P ranks of the group, R rows received and computed here, S
pairs received.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.select import kernels_for
from moeca_dist.parallel.coded_wire import CodedPairs
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.references import BlockCoding
from moeca_dist.parallel.wire import Leg, Pairs
from moeca_dist.types import Branches, Routing


@dataclass(frozen=True)
class RowPlan:
    """Where the branches of one dispatch went: this rank's ``pairs``, and what it was sent as an owner.

    ``branches`` and ``leg``: branches and pairs there and here, rank by rank. ``payload``: whether any rank of the
    group sends anything, the same on all of them. ``starts_S``: the first received branch of each pair; ``gates_R``:
    their gates, None where branches return one by one. ``coded``: None where rows travel as they are.
    """

    pairs: Pairs
    branches: Leg
    leg: Leg
    payload: bool
    starts_S: Tensor
    gates_R: Tensor | None
    coded: CodedPairs | None = None


@dataclass(frozen=True)
class DispatchedRows:
    """Hidden rows grouped by local expert, with what combine needs to bring the outputs home.

    ``slot_of_branch_N``: position of each branch among the rows that combine returns. ``row_of_received_R``: for each
    received branch, its row. ``plan`` None: all experts are here.
    """

    rows_RD: Tensor
    rows_per_expert_L: Tensor
    slot_of_branch_N: Tensor
    row_of_received_R: Tensor
    plan: RowPlan | None = None


class Dispatcher(Protocol):
    """How a MoE layer reaches the experts."""

    def coded(self, coding: BlockCoding | None) -> "Dispatcher":
        """The same exchange with its rows coded; None: all rows as they are."""
        ...

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        """Count what the exact path would send for ``routing``; asked once in every evaluation of the router."""
        ...

    def dispatch(self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None = None) -> Pending[DispatchedRows]:
        """``branches`` in the order of their tokens; with ``gates_N`` the owners return weighted sums."""
        ...

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Pending[Tensor]:
        """[R, D] expert outputs -> [N, D] outputs of this rank's branches, in the order of ``slot_of_branch_N``."""
        ...

    def combine_sums(self, outputs_RD: Tensor, dispatched: DispatchedRows, routing: Routing) -> Pending[Tensor]:
        """[R, D] outputs of all branches of ``routing``, dispatched with their gates -> [T, D] weighted sums."""
        ...

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        """[T, D]: what ``combine_sums`` returns, bit for bit, from all branches as ``combine`` returned them."""
        ...


class LocalDispatcher:
    """All experts are here: order the rows by expert, nothing travels."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def coded(self, coding: BlockCoding | None) -> "LocalDispatcher":
        return self  # nothing travels

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        pass  # nothing travels

    def dispatch(self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None = None) -> Pending[DispatchedRows]:
        rows = kernels_for(x_TD.device).gather_rows(x_TD, branches.token_N, branches.expert_ids_N, self.num_experts)
        return Pending.ready(DispatchedRows(rows.rows_RD, rows.counts_L, rows.position_R, rows.position_R))

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Pending[Tensor]:
        return Pending.ready(outputs_RD)

    def combine_sums(self, outputs_RD: Tensor, dispatched: DispatchedRows, routing: Routing) -> Pending[Tensor]:
        return Pending.ready(self.weighted_sum(outputs_RD, dispatched, routing))

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        """A token's branches are added in the order of the slots, without materialising [T, K, D]."""
        slots_TK = dispatched.slot_of_branch_N.view_as(routing.expert_ids_TK)
        gates_TK = routing.gates_TK.to(rows_ND.dtype)
        return F.embedding_bag(slots_TK, rows_ND, per_sample_weights=gates_TK, mode="sum")

"""Moving branches to the ranks that hold their experts, and their outputs back.

A dispatcher turns branches (tokens and the experts that they go to) into rows grouped by local expert, and brings the
expert outputs home. What combine needs travels in the frozen ``DispatchedRows``.

Rows are gathered with ``index_select``: on CPU it takes a quarter of the time of advanced indexing.

Shape suffixes: T tokens of this rank, K routed experts per token, D hidden size, E experts, L experts held here,
N branches of this rank, P ranks of the group, R rows received and computed here.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.parallel.exchange import Exchange
from moeca_dist.parallel.pairs import PairExchange
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.types import Branches, Routing


@dataclass(frozen=True)
class RowPlan:
    """How the rows of one dispatch were ordered and where they went.

    ``computed_of_received_R``: for each received row, its position among the computed rows; None where rows stayed
    local. ``sent_splits`` and ``received_splits``: rows per rank. ``payload``: whether any rank of the group sends
    anything, the same on all of them.
    """

    computed_of_received_R: Tensor | None
    sent_splits: tuple[int, ...]
    received_splits: tuple[int, ...]
    payload: bool


@dataclass(frozen=True)
class DispatchedRows:
    """Hidden rows grouped by local expert, with what combine needs to bring the outputs home.

    ``slot_of_branch_N``: position of each branch among the rows that combine returns.
    """

    rows_RD: Tensor
    rows_per_expert_L: Tensor
    slot_of_branch_N: Tensor
    plan: RowPlan


class Dispatcher(Protocol):
    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        """Count what the exact path would send for ``routing``; asked once in every evaluation of the router."""
        ...

    def dispatch(self, x_TD: Tensor, branches: Branches) -> DispatchedRows: ...

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Tensor:
        """[R, D] expert outputs -> [N, D] outputs of this rank's branches, in the order of ``slot_of_branch_N``."""
        ...


class LocalDispatcher:
    """All experts are here: order the rows by expert, nothing travels."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        pass  # nothing travels

    def dispatch(self, x_TD: Tensor, branches: Branches) -> DispatchedRows:
        branch_of_slot_N, slot_of_branch_N = _sort(branches.expert_ids_N)
        rows_ND = x_TD.index_select(0, branches.token_N.index_select(0, branch_of_slot_N))
        counts_E = torch.bincount(branches.expert_ids_N, minlength=self.num_experts)
        plan = RowPlan(None, (rows_ND.shape[0],), (rows_ND.shape[0],), payload=False)
        return DispatchedRows(rows_ND, counts_E, slot_of_branch_N, plan)

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Tensor:
        return outputs_RD


class AllToAllDispatcher:
    """Experts are spread over the ranks of a group: exact exchange with variable splits.

    The ranks first gather the whole traffic matrix, so that all of them agree on every split, and on whether any row
    travels at all: a zero matrix issues no payload collective.
    """

    def __init__(self, exchange: Exchange, placement: ExpertPlacement) -> None:
        self.exchange = exchange
        self.pairs = PairExchange(exchange, placement)
        self.num_experts = placement.num_experts
        self.experts_per_rank = tuple(len(placement.experts_of(rank)) for rank in range(placement.num_ranks))
        position_of_expert = [0] * placement.num_experts
        for position, expert in enumerate(placement.send_order):
            position_of_expert[expert] = position
        self.position_of_expert_E = torch.tensor(position_of_expert)

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        owner_TK = self.pairs.owners(routing.expert_ids_TK.device)[routing.expert_ids_TK]
        away = (owner_TK != self.exchange.rank).sum()
        # Every branch that lives elsewhere: its hidden row there, its output back. Stays on the device, unread.
        self.exchange.traffic.bytes_exact += away * (2 * x_TD.shape[1] * x_TD.element_size())

    def dispatch(self, x_TD: Tensor, branches: Branches) -> DispatchedRows:
        # The table moves once, to wherever routing is computed.
        self.position_of_expert_E = self.position_of_expert_E.to(branches.expert_ids_N.device)
        positions_N = self.position_of_expert_E.index_select(0, branches.expert_ids_N)
        branch_of_slot_N, slot_of_branch_N = _sort(positions_N)
        counts_E = torch.bincount(positions_N, minlength=self.num_experts)
        traffic_PE = self.exchange.gather_counts(counts_E)
        per_rank = traffic_PE.split(self.experts_per_rank, dim=1)
        counts_PL = per_rank[self.exchange.rank]
        sent = tuple(counts[self.exchange.rank].sum().item() for counts in per_rank)
        received = tuple(counts_PL.sum(1).tolist())
        order_R = _group_by_expert(counts_PL).to(x_TD.device)
        plan = RowPlan(_inverse(order_R), sent, received, payload=bool(traffic_PE.any()))
        rows_ND = x_TD.index_select(0, branches.token_N.index_select(0, branch_of_slot_N))
        rows_RD = self._travel(rows_ND, sent, received, plan.payload).index_select(0, order_R)
        return DispatchedRows(rows_RD, counts_PL.sum(0).to(x_TD.device), slot_of_branch_N, plan)

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Tensor:
        plan = dispatched.plan
        assert plan.computed_of_received_R is not None
        by_source_RD = outputs_RD.index_select(0, plan.computed_of_received_R)
        return self._travel(by_source_RD, plan.received_splits, plan.sent_splits, plan.payload)

    def _travel(self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], payload: bool) -> Tensor:
        if not payload:
            self.exchange.elide()
            return rows
        return self.exchange.all_to_all_rows(rows, sent, received)


def weighted_sum(rows_ND: Tensor, slot_of_branch_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """y_t = sum over k of gate_tk * row[slot_tk], without materialising [T, K, D]; slots are summed in order."""
    return F.embedding_bag(slot_of_branch_TK, rows_ND, per_sample_weights=gates_TK.to(rows_ND.dtype), mode="sum")


def _sort(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """Branches ordered by key: (branch of each slot, slot of each branch); ties keep their order."""
    branch_of_slot_N = keys_N.argsort(stable=True)
    return branch_of_slot_N, _inverse(branch_of_slot_N)


def _inverse(order_N: Tensor) -> Tensor:
    """Where each element went: ``inverse[order[i]] = i``."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0], device=order_N.device))


def _group_by_expert(counts_PL: Tensor) -> Tensor:
    """Order that turns rows sorted by (source rank, local expert) into rows sorted by (local expert, source rank)."""
    num_ranks, num_local = counts_PL.shape
    expert_of_row_R = torch.arange(num_local).repeat(num_ranks).repeat_interleave(counts_PL.flatten())
    return expert_of_row_R.argsort(stable=True)

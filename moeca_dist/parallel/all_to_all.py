"""Moving branches to the ranks that hold their experts, and their outputs back.

Rows are gathered with ``index_select``: on CPU it takes a quarter of the time of advanced indexing.

Shape suffixes: T tokens of this rank, K routed experts per token, D hidden size, E experts, N branches of this rank, M
pairs of a token of this rank and an owner, P ranks of the group, R rows received and computed here, S pairs received, W
words of a header.
"""

import copy

import torch
from torch import Tensor

from moeca_dist.kernels.reference import inverse
from moeca_dist.kernels.select import kernels_for
from moeca_dist.parallel.coded_wire import CodedPairs, send_pairs
from moeca_dist.parallel.dispatch import DispatchedRows, RowPlan
from moeca_dist.parallel.exchange import Exchange
from moeca_dist.parallel.pairs import PairExchange
from moeca_dist.parallel.pending import Pending
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.references import BlockCoding
from moeca_dist.parallel.wire import WORD_BYTES, Pairs, legs, pair_sums, paired, send, send_back, token_sums
from moeca_dist.types import Branches, Routing, positions

BRANCH_HEADER_BYTES = WORD_BYTES  # expert, and whether a pair starts
SUM_HEADER_BYTES = 2 * WORD_BYTES  # and the gate


class AllToAllDispatcher:
    """Experts are spread over the ranks of a group: exact exchange with variable splits.

    The ranks first gather the whole traffic matrix, so that all of them agree on every split, and on whether any row
    travels at all: a zero matrix issues no payload collective. A token's hidden row goes to each owner once.
    """

    def __init__(self, exchange: Exchange, placement: ExpertPlacement) -> None:
        self.exchange = exchange
        self.pairs = PairExchange(exchange, placement)
        self.num_ranks = placement.num_ranks
        self.num_local = len(placement.experts_of(exchange.rank))
        self.coding: BlockCoding | None = None

    def coded(self, coding: BlockCoding | None) -> "AllToAllDispatcher":
        """Another one with the same tables: layers share a dispatcher, and each has its own references."""
        if coding is self.coding:
            return self
        view = copy.copy(self)
        view.coding = coding
        return view

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        owner_TK = self.pairs.owners(routing.expert_ids_TK.device)[routing.expert_ids_TK]
        branches_TP = torch.zeros(len(owner_TK), self.num_ranks, dtype=torch.int64, device=owner_TK.device)
        branches_TP.scatter_add_(1, owner_TK, torch.ones_like(owner_TK))
        branches_TP[:, self.exchange.rank] = 0
        away, away_pairs = branches_TP.sum(), (branches_TP > 0).sum()
        # Every branch that lives elsewhere has a header, every pair a hidden row there and a sum back. Stays on the
        # device, unread.
        rows = away_pairs * (2 * x_TD.shape[1] * x_TD.element_size())
        self.exchange.traffic.bytes_exact += away * SUM_HEADER_BYTES + rows

    def dispatch(self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None = None) -> Pending[DispatchedRows]:
        owner_N = self.pairs.owners(branches.expert_ids_N.device).index_select(0, branches.expert_ids_N)
        pairs = paired(owner_N, branches.token_N)
        traffic = self.exchange.gather_counts(pairs.counts(self.num_ranks).flatten())
        return self._dispatch(x_TD, branches, gates_N, pairs, traffic.view(self.num_ranks, 2, self.num_ranks))

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Pending[Tensor]:
        plan = dispatched.plan
        assert plan is not None
        rows_RD = outputs_RD.index_select(0, dispatched.row_of_received_R)
        if plan.coded is not None:
            return plan.coded.branches_back(self.exchange, rows_RD, plan.branches)
        return send_back(self.exchange, rows_RD, plan.branches, payload=plan.payload)

    def combine_sums(self, outputs_RD: Tensor, dispatched: DispatchedRows, routing: Routing) -> Pending[Tensor]:
        plan = dispatched.plan
        assert plan is not None and plan.gates_R is not None
        sums_SD = pair_sums(dispatched.row_of_received_R, outputs_RD, plan.starts_S, plan.gates_R)
        if plan.coded is not None:
            returning = plan.coded.sums_back(self.exchange, sums_SD, plan.leg)
        else:
            returning = send_back(self.exchange, sums_SD, plan.leg, payload=plan.payload)
        return returning.then(lambda rows_MD: token_sums(rows_MD, plan.pairs.token_M, routing.num_tokens))

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        """Pair by pair, then over the pairs: the order of the sum is that in which the owners and home share it."""
        assert dispatched.plan is not None
        pairs = dispatched.plan.pairs
        gates_N = routing.gates_TK.flatten().index_select(0, pairs.branch_N)
        slot_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
        rows_MD = pair_sums(slot_N, rows_ND, pairs.first_M, gates_N)
        return token_sums(rows_MD, pairs.token_M, routing.num_tokens)

    def _dispatch(
        self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None, pairs: Pairs, traffic_P2P: Tensor
    ) -> Pending[DispatchedRows]:
        branch_leg, leg = legs(traffic_P2P, self.exchange.rank)
        payload = bool(traffic_P2P.any())
        header_NW = self._headers(branches, gates_N, pairs)
        rows_MD = x_TD.index_select(0, pairs.token_M)
        slot_of_branch_N = inverse(pairs.branch_N)

        def grouped(arrived: tuple[Tensor, Tensor, CodedPairs | None]) -> DispatchedRows:
            header_RW, hidden_SD, coded = arrived
            code_R = header_RW[:, 0]
            starts_R = (code_R & 1) != 0
            rows = kernels_for(x_TD.device).gather_rows(hidden_SD, starts_R.cumsum(0) - 1, code_R >> 1, self.num_local)
            starts_S = positions(starts_R, hidden_SD.shape[0])
            gates_R = None if gates_N is None else header_RW[:, 1].contiguous().view(torch.float32)
            plan = RowPlan(pairs, branch_leg, leg, payload, starts_S, gates_R, coded)
            return DispatchedRows(rows.rows_RD, rows.counts_L, slot_of_branch_N, rows.position_R, plan)

        if self.coding is not None and payload:
            return send_pairs(self.exchange, header_NW, rows_MD, pairs, branch_leg, leg, self.coding).then(grouped)
        coming = send(self.exchange, header_NW, rows_MD, branch_leg, leg, payload=payload)
        return coming.then(lambda arrived: grouped((*arrived, None)))

    def _headers(self, branches: Branches, gates_N: Tensor | None, pairs: Pairs) -> Tensor:
        """int32 [N, 1 or 2]: expert among the owner's own and whether a pair starts; the bits of the fp32 gate."""
        expert_N = self.pairs.local_id_E[branches.expert_ids_N.index_select(0, pairs.branch_N)]
        code_N = (expert_N * 2 + pairs.starts_N).to(torch.int32)
        if gates_N is None:
            return code_N[:, None]
        gate_N = gates_N.index_select(0, pairs.branch_N).float().view(torch.int32)
        return torch.stack([code_N, gate_N], 1)

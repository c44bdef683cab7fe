"""The kernels in plain PyTorch: what runs on CPU, and what the others are tested against.

Nothing here waits for the device: all shapes follow from those of the arguments.

Shape suffixes: as in ``types``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.row_codes import RowFormat, decode, encode
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    GatheredRows,
    HeldRows,
    RoutedTokens,
    RouterWeights,
    RowStore,
    StoredBranches,
)

NORM_EPS = 1e-6


class ReferenceKernels:
    fuses_routing = False

    def gather_rows(self, x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
        expert_R = expert_R.long()
        order_R = expert_R.argsort(stable=True)
        counts_L = expert_R.new_zeros(num_experts).scatter_add_(0, expert_R, torch.ones_like(expert_R))
        rows_RD = x_SD.index_select(0, source_R.index_select(0, order_R))
        return GatheredRows(rows_RD, counts_L, inverse(order_R))

    def serve_branches(self, stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, step: int) -> Tensor:
        tokens, k = stored.steps_TK.shape
        first_T1 = torch.arange(0, tokens * k, k, device=stored.steps_TK.device)[:, None]
        at_TK = branches.entry_TK + first_T1
        weights_TK = (branches.gates_TK * ~branches.refresh_TK).to(stored.values_TKD.dtype)
        # Bags of rows take a third of the time of a batched product of weights and entries on CPU.
        total_TD = _weighted_rows(at_TK, stored.values_TKD, weights_TK)
        if stored.slopes_TKD is not None:
            ahead_TK = weights_TK * (step - stored.steps_TK.gather(1, branches.entry_TK))
            total_TD += _weighted_rows(at_TK, stored.slopes_TKD, ahead_TK)
        if fresh.branch_N.shape[0]:
            _add_fresh(total_TD, branches, fresh)
            _keep(stored, branches, fresh, at_TK, step)
        return total_TD

    def gated_residual(self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor) -> None:
        torch.add(x_BTD, gate_BD[:, None] * _expected(forecast), out=after_BTD)

    def residual_modulated(
        self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering
    ) -> None:
        self.gated_residual(x_BTD, gate_BD, forecast, after_BTD)
        normed_BTD = F.layer_norm(after_BTD, after_BTD.shape[-1:], eps=NORM_EPS)
        scaled_BTD = normed_BTD * (1 + entering.scale_BD[:, None])
        torch.add(scaled_BTD, entering.shift_BD[:, None], out=entering.out_BTD)

    def route(self, x_TD: Tensor, router: RouterWeights, stored_ids_TK: Tensor) -> RoutedTokens:
        if router.scoring == "sigmoid":
            scores_TE = F.linear(x_TD.float(), router.weight_ED.float()).sigmoid()
        else:
            scores_TE = F.linear(x_TD, router.weight_ED).softmax(dim=-1)
        choice_TE = scores_TE if router.bias_E is None else scores_TE + router.bias_E
        ids_TK = choice_TE.topk(router.k, dim=-1).indices
        gates_TK = scores_TE.gather(-1, ids_TK)
        if router.normalised:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20) * router.scale
        return RoutedTokens(ids_TK, gates_TK, *match_entries(ids_TK, stored_ids_TK))

    def encode_rows(self, rows_ND: Tensor, held: HeldRows | None, form: RowFormat) -> Tensor:
        reference_ND = _held(held)
        coded_NW = encode(rows_ND, reference_ND, form)
        if held is not None:
            _hold(held, decode(coded_NW, reference_ND, form, rows_ND.dtype))
        return coded_NW

    def decode_rows(
        self, coded_NW: Tensor, held: HeldRows | None, form: RowFormat, width: int, dtype: torch.dtype
    ) -> Tensor:
        rows_ND = decode(coded_NW, _held(held), form, dtype)
        if held is not None:
            _hold(held, rows_ND)
        return rows_ND


def _held(held: HeldRows | None) -> Tensor | None:
    return None if held is None else held.rows_SD.index_select(0, held.key_N)


def _hold(held: HeldRows, rows_ND: Tensor) -> None:
    # What is not finite would break all that follows: after it the pair starts anew.
    held.rows_SD.index_copy_(0, held.key_N, rows_ND.nan_to_num(0.0, 0.0, 0.0))


def match_entries(ids_TK: Tensor, stored_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(entry_TK, found_TK): each branch by its expert id; the n-th one not found gets the n-th entry that is free."""
    same_TKK = ids_TK[:, :, None] == stored_ids_TK[:, None, :]
    found_TK, free_TK = same_TKK.any(2), ~same_TKK.any(1)
    nth_missing_TK = (~found_TK).cumsum(1).masked_fill(found_TK, 0)
    nth_free_TK = free_TK.cumsum(1).masked_fill(~free_TK, -1)
    same_TKK |= nth_missing_TK[:, :, None] == nth_free_TK[:, None, :]
    return same_TKK.int().argmax(2), found_TK


def slopes(values_ND: Tensor, before_ND: Tensor, gap_N: Tensor, found_N: Tensor) -> Tensor:
    """[N, D] change per step; zero where ``before`` is another expert's value, or none."""
    inverse_N = torch.where(found_N, gap_N.to(values_ND.dtype).reciprocal(), 0.0)
    return (values_ND - before_ND) * inverse_N[:, None]


def inverse(order_N: Tensor) -> Tensor:
    """Where each element went: ``inverse[order[i]] = i``."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0], device=order_N.device))


def _weighted_rows(at_TK: Tensor, stored_TKD: RowStore, weights_TK: Tensor) -> Tensor:
    """[T, D]: sum over k of weight x the row ``at`` of all stored ones."""
    rows = stored_TKD.unpack().view(-1, stored_TKD.shape[-1])
    return F.embedding_bag(at_TK, rows, per_sample_weights=weights_TK, mode="sum")


def _add_fresh(total_TD: Tensor, branches: BranchesToServe, fresh: FreshRows) -> None:
    """Add gate x row, in the order of the branches."""
    gates_N = branches.gates_TK.flatten().index_select(0, fresh.branch_N).to(total_TD.dtype)
    weighted_ND = fresh.rows_RD.index_select(0, fresh.row_N) * gates_N[:, None]
    total_TD.index_add_(0, fresh.branch_N // branches.gates_TK.shape[1], weighted_ND)


def _keep(stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, at_TK: Tensor, step: int) -> None:
    """Store the fresh rows, and where there are slopes how they changed since they were stored last."""
    at_N = at_TK.flatten().index_select(0, fresh.branch_N)
    values_ND = fresh.rows_RD.index_select(0, fresh.row_N)
    steps = stored.steps_TK.view(-1)
    if stored.slopes_TKD is not None:
        gap_N, found_N = step - steps[at_N], branches.found_TK.flatten()[fresh.branch_N]
        stored.slopes_TKD.put(at_N, slopes(values_ND, stored.values_TKD.rows(at_N), gap_N, found_N))
    stored.values_TKD.put(at_N, values_ND)
    steps.index_fill_(0, at_N, step)


def _expected(forecast: Forecast) -> Tensor:
    out_BTD = forecast.value_BTD
    for difference_BTD, factor in forecast.terms:
        if isinstance(factor, Tensor):
            out_BTD = torch.addcmul(out_BTD, difference_BTD, factor.to(difference_BTD.dtype))
        else:
            out_BTD = torch.add(out_BTD, difference_BTD, alpha=factor)
    return out_BTD

"""The kernels in plain PyTorch: what runs by default, and what the others are tested against.

Nothing here waits for the device: all shapes follow from those of the arguments.

Shape suffixes: as in ``types``.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    GatheredRows,
    Kernels,
    RowStore,
    StoredBranches,
)

NORM_EPS = 1e-6


class ReferenceKernels:
    """The kernels in plain PyTorch."""

    def gather_rows(self, x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
        expert_R = expert_R.long()
        order_R = expert_R.argsort(stable=True)
        counts_L = expert_R.new_zeros(num_experts).scatter_add_(0, expert_R, torch.ones_like(expert_R))
        rows_RD = x_SD.index_select(0, source_R.index_select(0, order_R))
        return GatheredRows(rows_RD, counts_L, inverse(order_R))

    def serve_branches(self, stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, step: int) -> Tensor:
        weights_N = (branches.gate_N * ~branches.refresh_N).to(stored.values_ND.dtype)
        total_TD = _weighted_rows(branches, stored.values_ND, weights_N)
        if stored.slopes_ND is not None:
            ahead_N = weights_N * (step - stored.step_N.index_select(0, branches.row_N))
            total_TD += _weighted_rows(branches, stored.slopes_ND, ahead_N)
        if fresh.branch_M.shape[0]:
            values_MD = fresh.rows_RD.index_select(0, fresh.row_M)
            _add_fresh(total_TD, branches, fresh.branch_M, values_MD)
            found_M = branches.found_N.index_select(0, fresh.branch_M)
            store_rows(stored, branches.row_N.index_select(0, fresh.branch_M), found_M, values_MD, step)
        return total_TD

    def gated_residual(self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor) -> None:
        expected_BTD = forecast.sum() if forecast.terms else forecast.value_BTD
        torch.add(x_BTD, gate_BD[:, None] * expected_BTD, out=after_BTD)

    def residual_modulated(
        self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering
    ) -> None:
        self.gated_residual(x_BTD, gate_BD, forecast, after_BTD)
        normed_BTD = F.layer_norm(after_BTD, after_BTD.shape[-1:], eps=NORM_EPS)
        scaled_BTD = normed_BTD * (1 + entering.scale_BD[:, None])
        torch.add(scaled_BTD, entering.shift_BD[:, None], out=entering.out_BTD)


REFERENCE: Final[Kernels] = ReferenceKernels()


def store_rows(stored: StoredBranches, row_M: Tensor, found_M: Tensor, values_MD: Tensor, step: int) -> None:
    """Store values that were computed in ``step``, and their change per step since they were last computed.

    The change is zero unless ``found_M``: the row then holds another branch's value, or none.
    """
    if stored.slopes_ND is not None:
        gap_M = (step - stored.step_N.index_select(0, row_M)).to(values_MD.dtype)
        per_step_M = torch.where(found_M, gap_M.reciprocal(), 0.0)
        stored.slopes_ND.put(row_M, (values_MD - stored.values_ND.rows(row_M)) * per_step_M[:, None])
    stored.values_ND.put(row_M, values_MD)
    stored.step_N.index_fill_(0, row_M, step)


def inverse(order_N: Tensor) -> Tensor:
    """Return the new position of each element: ``inverse[order[i]] = i``."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0], device=order_N.device))


def _weighted_rows(branches: BranchesToServe, stored_ND: RowStore, weights_N: Tensor) -> Tensor:
    """Return [T, D]: the sum of weight x stored row over the branches of each token."""
    # Bags of rows take a third of the time of a batched product of weights and rows on CPU.
    return F.embedding_bag(
        branches.row_N, stored_ND.unpack(), branches.start_T, per_sample_weights=weights_N, mode="sum"
    )


def _add_fresh(total_TD: Tensor, branches: BranchesToServe, branch_M: Tensor, values_MD: Tensor) -> None:
    """Add gate x value, in the order of the branches."""
    gate_M = branches.gate_N.index_select(0, branch_M).to(total_TD.dtype)
    total_TD.index_add_(0, branches.token_N.index_select(0, branch_M), values_MD * gate_M[:, None])

"""The kernels in Triton, behind the interface of their references.

They accumulate in fp32 and round once. The references round after every operation. In fp32 both agree to rounding.

Shape suffixes: as in ``types``.
"""

import torch
from torch import Tensor

from moeca_dist.kernels.reference import ReferenceKernels
from moeca_dist.kernels.triton_branches import serve_tokens
from moeca_dist.kernels.triton_gather import gather_by_expert
from moeca_dist.kernels.triton_residual import residual
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    GatheredRows,
    StoredBranches,
)


class TritonKernels(ReferenceKernels):
    """The kernels in Triton. Rows that are kept smaller than computed are served by the reference."""

    def gather_rows(self, x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
        return gather_by_expert(x_SD, source_R, expert_R, num_experts)

    def serve_branches(self, stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, step: int) -> Tensor:
        values_ND = stored.values_ND.exact
        slopes_ND = None if stored.slopes_ND is None else stored.slopes_ND.exact
        if values_ND is None or (stored.slopes_ND is not None and slopes_ND is None):
            # Rows that are kept smaller than computed are brought back outside.
            return super().serve_branches(stored, branches, fresh, step)
        fresh_N = torch.full_like(branches.row_N, -1).scatter_(0, fresh.branch_M, fresh.row_M)
        return serve_tokens(
            values_ND, slopes_ND, stored.step_N, branches.gate_N, branches.row_N, branches.found_N, fresh_N,
            branches.start_T, fresh.rows_RD, step,
        )  # fmt: skip

    def gated_residual(self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor) -> None:
        residual(x_BTD, gate_BD, forecast, after_BTD, None)

    def residual_modulated(
        self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering
    ) -> None:
        residual(x_BTD, gate_BD, forecast, after_BTD, entering)

"""The kernels in Triton, behind the interface of their references.

They accumulate in fp32 and round once, where the references round after every operation; in fp32 both agree to
rounding.

Shape suffixes: as in ``types``.
"""

import torch
from torch import Tensor

from moeca_dist.kernels.fused_branches import serve_tokens
from moeca_dist.kernels.fused_codes import decode_rows, encode_rows
from moeca_dist.kernels.fused_gather import gather_by_expert
from moeca_dist.kernels.fused_residual import residual
from moeca_dist.kernels.fused_router import route_tokens
from moeca_dist.kernels.reference import ReferenceKernels
from moeca_dist.kernels.row_codes import RowFormat
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    GatheredRows,
    HeldRows,
    RoutedTokens,
    RouterWeights,
    StoredBranches,
)


class FusedKernels(ReferenceKernels):
    fuses_routing = True

    def gather_rows(self, x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
        return gather_by_expert(x_SD, source_R, expert_R, num_experts)

    def serve_branches(self, stored: StoredBranches, branches: BranchesToServe, fresh: FreshRows, step: int) -> Tensor:
        values_TKD = stored.values_TKD.exact
        slopes_TKD = None if stored.slopes_TKD is None else stored.slopes_TKD.exact
        if values_TKD is None or (stored.slopes_TKD is not None and slopes_TKD is None):
            # Rows that are kept smaller than computed are brought back outside.
            return super().serve_branches(stored, branches, fresh, step)
        tokens, k = branches.gates_TK.shape
        row_N = torch.full((tokens * k,), -1, dtype=torch.int64, device=values_TKD.device)
        row_N.scatter_(0, fresh.branch_N, fresh.row_N)
        return serve_tokens(
            values_TKD, slopes_TKD, stored.steps_TK, branches.gates_TK, branches.entry_TK, branches.found_TK,
            row_N.view(tokens, k), fresh.rows_RD, step,
        )  # fmt: skip

    def gated_residual(self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor) -> None:
        residual(x_BTD, gate_BD, forecast, after_BTD, None)

    def residual_modulated(
        self, x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering
    ) -> None:
        residual(x_BTD, gate_BD, forecast, after_BTD, entering)

    def route(self, x_TD: Tensor, router: RouterWeights, stored_ids_TK: Tensor) -> RoutedTokens:
        return route_tokens(x_TD, router, stored_ids_TK)

    def encode_rows(self, rows_ND: Tensor, held: HeldRows | None, form: RowFormat) -> Tensor:
        return encode_rows(rows_ND, held, form)

    def decode_rows(
        self, coded_NW: Tensor, held: HeldRows | None, form: RowFormat, width: int, dtype: torch.dtype
    ) -> Tensor:
        return decode_rows(coded_NW, held, form, width, dtype)

"""Rows into expert order: a stable counting sort of the experts, then one copy of each row.

Shape suffixes: S source rows, D hidden size, R rows, L experts held here, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_dist.kernels.row_stride import with_unit_stride
from moeca_dist.kernels.types import GatheredRows

_ROWS = 64  # of one counting program


@triton.jit
def _count(expert_R, rank_R, counts_PL, num_rows, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Count the rows of each expert in this program, and rank each row among those of its expert."""
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    expert = tl.load(expert_R + row, mask=inside, other=EXPERTS)
    column = tl.arange(0, EXPERTS)
    is_mine = (expert[:, None] == column[None, :]).to(tl.int32)
    rank = tl.sum(tl.cumsum(is_mine, axis=0) * is_mine, axis=1) - 1
    tl.store(rank_R + row, rank, mask=inside)
    tl.store(counts_PL + program * num_experts + column, tl.sum(is_mine, axis=0), mask=column < num_experts)


@triton.jit
def _move(
    x_SD, source_R, expert_R, rank_R, first_PL, rows_RD, position_R, num_experts, width, x_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    expert = tl.load(expert_R + row)
    position = tl.load(first_PL + (row // ROWS) * num_experts + expert) + tl.load(rank_R + row)
    tl.store(position_R + row, position)
    source = tl.load(source_R + row)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        values = tl.load(x_SD + source * x_stride + column, mask=inside)
        tl.store(rows_RD + position * width + column, values, mask=inside)


def gather_by_expert(x_SD: Tensor, source_R: Tensor, expert_R: Tensor, num_experts: int) -> GatheredRows:
    """Return ``x_SD[source_R]`` grouped by expert."""
    num_rows, width = source_R.shape[0], x_SD.shape[1]
    rows_RD = x_SD.new_empty(num_rows, width)
    position_R = torch.empty_like(source_R)
    if not num_rows:
        return GatheredRows(rows_RD, source_R.new_zeros(num_experts), position_R)
    x_SD = with_unit_stride(x_SD)
    source_R, expert_R = source_R.contiguous(), expert_R.contiguous()
    programs = triton.cdiv(num_rows, _ROWS)
    rank_R = torch.empty(num_rows, dtype=torch.int32, device=x_SD.device)
    counts_PL = torch.empty(programs, num_experts, dtype=torch.int32, device=x_SD.device)
    _count[(programs,)](
        expert_R, rank_R, counts_PL, num_rows, num_experts, ROWS=_ROWS, EXPERTS=triton.next_power_of_2(num_experts)
    )
    totals_L = counts_PL.sum(0)
    first_PL = (totals_L.cumsum(0) - totals_L) + counts_PL.cumsum(0) - counts_PL
    _move[(num_rows,)](
        x_SD, source_R, expert_R, rank_R, first_PL, rows_RD, position_R, num_experts, width, x_SD.stride(0),
        ROWS=_ROWS, WIDTH=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return GatheredRows(rows_RD, totals_L, position_R)

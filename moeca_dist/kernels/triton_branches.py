"""The routed sum of a cached step in one pass over the stored branches: forecasts exist only in registers.

Shape suffixes: T tokens, N branches, D hidden size, R rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _serve(
    values_ND, slopes_ND, step_N, gate_N, row_N, found_N, fresh_N, start_T, rows_RD, out_TD, step, num_branches,
    num_tokens, width, FORECAST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Serve one token. No other program reads or writes the rows of its branches."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(start_T + token)
    last = tl.load(start_T + token + 1, mask=token + 1 < num_tokens, other=num_branches)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        for branch in range(first, last):
            place = tl.load(row_N + branch)
            row = tl.load(fresh_N + branch)
            gate = tl.load(gate_N + branch).to(tl.float32)
            # Spread over the columns: the interpreter takes no mask that mixes in a single number.
            is_fresh, is_kept = inside & (row + 0 * column >= 0), inside & (row + 0 * column < 0)
            at = values_ND + place * width + column
            now = tl.load(rows_RD + row * width + column, mask=is_fresh, other=0.0).to(tl.float32)
            if FORECAST:
                gap = (step - tl.load(step_N + place)).to(tl.float32)
                before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                slope_at = slopes_ND + place * width + column
                slope = tl.load(slope_at, mask=is_kept, other=0.0).to(tl.float32)
                is_found = tl.load(found_N + branch) != 0
                # A branch that is computed again in the step of its last value has no slope to learn from.
                changed = (now - before) / tl.where(gap == 0, 1.0, gap)
                tl.store(slope_at, tl.where(is_found, changed, 0.0), mask=is_fresh)
                stored = before + slope * gap
            else:
                stored = tl.load(at, mask=is_kept, other=0.0).to(tl.float32)
            tl.store(at, now, mask=is_fresh)
            total += gate * tl.where(is_fresh, now, stored)
        tl.store(out_TD + token * width + column, total, mask=inside)
    for branch in range(first, last):
        if tl.load(fresh_N + branch) >= 0:
            tl.store(step_N + tl.load(row_N + branch), step)


def serve_tokens(
    values_ND: Tensor, slopes_ND: Tensor | None, step_N: Tensor, gate_N: Tensor, row_N: Tensor, found_N: Tensor,
    fresh_N: Tensor, start_T: Tensor, rows_RD: Tensor, step: int,
) -> Tensor:  # fmt: skip
    """Return the routed sums [T, D], and update values, slopes and steps.

    Args:
        fresh_N: the computed row of each branch, -1 if it is served.
    """
    tokens, width = start_T.shape[0], values_ND.shape[1]
    out_TD = torch.empty(tokens, width, dtype=values_ND.dtype, device=values_ND.device)
    if not tokens:
        return out_TD
    for stored in (values_ND, step_N, *([] if slopes_ND is None else [slopes_ND])):
        assert stored.is_contiguous()
    _serve[(tokens,)](
        values_ND, values_ND if slopes_ND is None else slopes_ND, step_N, gate_N.contiguous(), row_N.contiguous(),
        found_N.contiguous().view(torch.uint8), fresh_N.contiguous(), start_T.contiguous(), rows_RD.contiguous(),
        out_TD, step, gate_N.shape[0], tokens, width,
        FORECAST=slopes_ND is not None, WIDTH=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return out_TD

"""The routed sum of a cached step in one pass over the stored branches: forecasts exist only in registers.

Shape suffixes: T tokens, K routed experts and entries per token, D hidden size, R rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _serve(
    values_TKD, slopes_TKD, steps_TK, gates_TK, entry_TK, found_TK, row_TK, rows_RD, out_TD, step, width,
    K: tl.constexpr, FORECAST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token: no other program reads or writes its entries."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        for k in tl.static_range(K):
            branch = token * K + k
            place = token * K + tl.load(entry_TK + branch)
            row = tl.load(row_TK + branch)
            gate = tl.load(gates_TK + branch).to(tl.float32)
            # Spread over the columns: the interpreter takes no mask that mixes in a single number.
            is_fresh, is_kept = inside & (row + 0 * column >= 0), inside & (row + 0 * column < 0)
            at = values_TKD + place * width + column
            now = tl.load(rows_RD + row * width + column, mask=is_fresh, other=0.0).to(tl.float32)
            if FORECAST:
                gap = (step - tl.load(steps_TK + place)).to(tl.float32)
                before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                slope_at = slopes_TKD + place * width + column
                slope = tl.load(slope_at, mask=is_kept, other=0.0).to(tl.float32)
                is_found = tl.load(found_TK + branch) != 0
                # A branch that is computed again in the step of its last value has no slope to learn from.
                changed = (now - before) / tl.where(gap == 0, 1.0, gap)
                tl.store(slope_at, tl.where(is_found, changed, 0.0), mask=is_fresh)
                stored = before + slope * gap
            else:
                stored = tl.load(at, mask=is_kept, other=0.0).to(tl.float32)
            tl.store(at, now, mask=is_fresh)
            total += gate * tl.where(is_fresh, now, stored)
        tl.store(out_TD + token * width + column, total, mask=inside)
    for k in tl.static_range(K):
        branch = token * K + k
        place = token * K + tl.load(entry_TK + branch)
        if tl.load(row_TK + branch) >= 0:
            tl.store(steps_TK + place, step)


def serve_tokens(
    values_TKD: Tensor, slopes_TKD: Tensor | None, steps_TK: Tensor, gates_TK: Tensor, entry_TK: Tensor,
    found_TK: Tensor, row_TK: Tensor, rows_RD: Tensor, step: int,
) -> Tensor:  # fmt: skip
    """[T, D]; ``row_TK``: the computed row of each branch, -1 where it is served. Updates values, slopes and steps."""
    tokens, k = gates_TK.shape
    width = values_TKD.shape[2]
    out_TD = torch.empty(tokens, width, dtype=values_TKD.dtype, device=values_TKD.device)
    if not tokens:
        return out_TD
    for stored in (values_TKD, steps_TK, *([] if slopes_TKD is None else [slopes_TKD])):
        assert stored.is_contiguous()
    _serve[(tokens,)](
        values_TKD, values_TKD if slopes_TKD is None else slopes_TKD, steps_TK, gates_TK.contiguous(),
        entry_TK.contiguous(), found_TK.contiguous().view(torch.uint8), row_TK.contiguous(), rows_RD.contiguous(),
        out_TD, step, width,
        K=k, FORECAST=slopes_TKD is not None, WIDTH=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return out_TD

"""Residual + gate + forecast, and with it the norm and modulation of what comes next, in one pass.

Shape suffixes: B images, T tokens of one image, D hidden size.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_dist.kernels.reference import NORM_EPS
from moeca_dist.kernels.row_stride import with_unit_stride
from moeca_dist.kernels.types import Entering, Forecast

MAX_TERMS = 3  # the highest order of a module's forecast


@triton.jit
def _row(
    x_BTD, gate_BD, value_BTD, first_BTD, second_BTD, third_BTD, factors, shift_BD, scale_BD, after_BTD, entering_BTD,
    tokens, width, gate_stride, shift_stride, scale_stride, factor_stride, eps,
    TERMS: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one token of one image.

    Args:
        factors: [terms, 1 or B * T], with a stride of 0 if all tokens share them.
    """
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    rows = tl.num_programs(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = row * width + column
    branch = tl.load(value_BTD + at, mask=inside, other=0.0).to(tl.float32)
    size = tl.where(factor_stride == 0, 1, rows)
    if TERMS >= 1:
        factor = tl.load(factors + row * factor_stride)
        branch += factor * tl.load(first_BTD + at, mask=inside, other=0.0).to(tl.float32)
    if TERMS >= 2:
        factor = tl.load(factors + size + row * factor_stride)
        branch += factor * tl.load(second_BTD + at, mask=inside, other=0.0).to(tl.float32)
    if TERMS >= 3:
        factor = tl.load(factors + 2 * size + row * factor_stride)
        branch += factor * tl.load(third_BTD + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_BD + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(x_BTD + at, mask=inside, other=0.0).to(tl.float32) + gate * branch
    tl.store(after_BTD + at, after, mask=inside)
    if NORM:
        # The norm is that of what the residual stream holds, after rounding.
        after = after.to(after_BTD.dtype.element_ty).to(tl.float32)
        centred = tl.where(inside, after - tl.sum(after, axis=0) / width, 0.0)
        normed = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
        shift = tl.load(shift_BD + image * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_BD + image * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(entering_BTD + at, normed * (1 + scale) + shift, mask=inside)


def residual(x_BTD: Tensor, gate_BD: Tensor, forecast: Forecast, after_BTD: Tensor, entering: Entering | None) -> None:
    """Write ``x + gate * forecast`` to ``after``, and its modulated norm to ``entering`` if given.

    Both must be contiguous.
    """
    images, tokens, width = x_BTD.shape
    if not x_BTD.numel():
        return
    x_BTD, value_BTD = x_BTD.contiguous(), forecast.value_BTD.contiguous()
    terms = [difference_BTD.contiguous() for difference_BTD, _ in forecast.terms]
    assert len(terms) <= MAX_TERMS and after_BTD.is_contiguous()
    factors, stride = _factors([factor for _, factor in forecast.terms], x_BTD)
    gate_BD = with_unit_stride(gate_BD)
    out_BTD, shift_BD, scale_BD = after_BTD, gate_BD, gate_BD
    if entering is not None:
        assert entering.out_BTD.is_contiguous()
        out_BTD = entering.out_BTD
        shift_BD, scale_BD = with_unit_stride(entering.shift_BD), with_unit_stride(entering.scale_BD)
    padded = terms + [value_BTD] * (MAX_TERMS - len(terms))
    _row[(images * tokens,)](
        x_BTD, gate_BD, value_BTD, *padded, factors, shift_BD, scale_BD, after_BTD, out_BTD,
        tokens, width, gate_BD.stride(0), shift_BD.stride(0), scale_BD.stride(0), stride, NORM_EPS,
        TERMS=len(terms), NORM=entering is not None, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip


def _factors(factors: Sequence[float | Tensor], like: Tensor) -> tuple[Tensor, int]:
    """Return fp32 factors, one row per term, and the distance to the next token's."""
    if not factors:
        return torch.zeros(1, device=like.device), 0
    per_row = any(isinstance(factor, Tensor) for factor in factors)
    shape = (like.shape[0] * like.shape[1] if per_row else 1,)
    # Numbers are filled in on the device: copying them there would make the host wait.
    columns = [
        factor.float().reshape(shape)
        if isinstance(factor, Tensor)
        else torch.full(shape, factor, dtype=torch.float32, device=like.device)
        for factor in factors
    ]
    return torch.stack(columns), int(per_row)

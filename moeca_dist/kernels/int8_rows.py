"""Rows as 8-bit codes with one fp32 scale each: by themselves, or as the change of what the receiver holds.

Differential coding with the quantiser in the loop (DPCM, Jayant & Noll, Digital Coding of Waveforms, chapter 6): the
sender codes the change of the row against what the receiver *decoded* so far, not against the row it sent before. What
a code gets wrong is therefore part of the next change, and errors do not add up. Which of the two a row is, the sign of
its scale tells.

Shape suffixes: N rows, D hidden size, W bytes of a coded row: its scale, then D codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

SCALE_BYTES = 4


@dataclass(frozen=True)
class RowFormat:
    """``dtype`` of the codes; ``largest``: the code that the value of largest magnitude of a row gets."""

    dtype: torch.dtype
    largest: float


FORMATS: Mapping[str, RowFormat] = MappingProxyType(
    {"int8": RowFormat(torch.int8, 127.0), "fp8": RowFormat(torch.float8_e4m3fn, 448.0)}
)
"""By the names of ``parallel.rows``, less ``exact``."""


def encode(rows_ND: Tensor, reference_ND: Tensor | None, form: RowFormat) -> Tensor:
    """uint8 [N, W] of float rows [N, D]; ``reference_ND``: what the receiver holds, finite, None where it is nothing.

    A row is coded as its change where that is smaller, by the value of largest magnitude, which sets the scale. A row
    that is not finite is not smaller than anything: it goes by itself, its scale is NaN, and so is all that is decoded.
    """
    values_ND = rows_ND.float()
    largest_N = _largest(values_ND)
    sign: Tensor | float = -1.0
    if reference_ND is not None:
        of_change_N = _largest(values_ND - reference_ND.float())
        smaller_N = of_change_N < largest_N
        values_ND = values_ND - reference_ND.float() * smaller_N[:, None]
        largest_N = torch.where(smaller_N, of_change_N, largest_N)
        sign = smaller_N * 2.0 - 1.0
    scale_N = (largest_N / form.largest).clamp(min=torch.finfo(torch.float32).tiny)
    # An infinity would decode to infinities in some places and to NaN in others.
    scale_N = scale_N.masked_fill(~scale_N.isfinite(), torch.nan)
    codes_ND = values_ND / scale_N[:, None]
    if not form.dtype.is_floating_point:
        codes_ND = codes_ND.round_()
    scale_N4 = (scale_N * sign).view(torch.uint8).view(-1, SCALE_BYTES)
    return torch.cat([scale_N4, codes_ND.to(form.dtype).view(torch.uint8)], 1)


def decode(coded_NW: Tensor, reference_ND: Tensor | None, form: RowFormat, dtype: torch.dtype) -> Tensor:
    """[N, D] in ``dtype``. Sender and receiver both call it: the same operators, so the same bits."""
    scale_N1 = coded_NW[:, :SCALE_BYTES].flatten().view(torch.float32)[:, None]
    values_ND = _values(coded_NW[:, SCALE_BYTES:], form).mul_(scale_N1.abs())
    if reference_ND is not None:
        values_ND += reference_ND.float() * (scale_N1 > 0)
    if dtype == torch.float16:
        # The largest values, and half a code.
        limit = torch.finfo(dtype).max
        values_ND = values_ND.clamp_(-limit, limit)
    return values_ND.to(dtype)


def _largest(values_ND: Tensor) -> Tensor:
    """[N]: the largest magnitude of each row; NaN where there is one."""
    # The vector norm of order infinity takes 20 times as long on CPU, and magnitudes as much memory as the rows.
    return torch.maximum(values_ND.amax(-1), -values_ND.amin(-1))


def _values(codes_ND: Tensor, form: RowFormat) -> Tensor:
    """fp32 values of codes, given as bytes."""
    if form.dtype == torch.int8:
        return codes_ND.view(torch.int8).float()
    # By a table: torch converts float8 one by one on CPU, in five times the time.
    table = torch.arange(256, dtype=torch.uint8, device=codes_ND.device).view(form.dtype).float()
    return table.index_select(0, codes_ND.flatten().int()).view_as(codes_ND)

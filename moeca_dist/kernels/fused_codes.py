"""Rows to 8-bit codes and back, with what both ends hold: one pass over a row at either end.

Both ends decode with the same instructions, so that what they hold stays the same bit for bit. Against the reference
a last bit may differ: products and sums are fused here.

Shape suffixes: S held rows, N rows, D hidden size, W bytes of a coded row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_dist.kernels.int8_rows import SCALE_BYTES, RowFormat
from moeca_dist.kernels.launch import rows_apart
from moeca_dist.kernels.types import HeldRows

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
# Adding and taking it off rounds fp32 of small magnitude to integers, ties to even, as torch does.
_ROUNDING = tl.constexpr(1.5 * 2**23)
_FLOAT16_LARGEST = tl.constexpr(torch.finfo(torch.float16).max)


@triton.jit
def _decoded(codes, scale, base, rows_ND):
    """fp32: code * scale + base, after rounding to the dtype of ``rows_ND``, whose infinities it avoids in fp16."""
    values = tl.fma(codes, scale, base)
    if rows_ND.dtype.element_ty == tl.float16:
        # A comparison with NaN is false: it stays.
        values = tl.where(values > _FLOAT16_LARGEST, _FLOAT16_LARGEST, values)
        values = tl.where(values < -_FLOAT16_LARGEST, -_FLOAT16_LARGEST, values)
    return values.to(rows_ND.dtype.element_ty).to(tl.float32)


@triton.jit
def _finite_or_0(values):
    return tl.where(tl.abs(values) <= _LARGEST, values, 0.0)


@triton.jit
def _to_e4m3(values):
    """Bytes of fp32 that is at most 448: by its bits, as devices before compute capability 8.9 have no such type."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # To three bits of mantissa, ties to even; then the exponent's bias is 7 in place of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = ((tl.abs(values) * 512 + _ROUNDING) - _ROUNDING).to(tl.int32)
    codes = tl.where(tl.abs(values) < 0.015625, subnormal, normal)
    return (codes | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_e4m3(coded):
    codes = coded.to(tl.int32)
    magnitude = codes & 0x7F
    normal = ((magnitude + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    values = tl.where(magnitude < 8, magnitude.to(tl.float32) * (1.0 / 512), normal)
    return tl.where(codes >= 0x80, -values, values)


@triton.jit
def _code_values(coded, FLOAT: tl.constexpr):
    return _from_e4m3(coded) if FLOAT else coded.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _encode(
    rows_ND, held_SD, key_N, coded_NW, width, row_stride, largest,
    HELD: tl.constexpr, FLOAT: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    values = tl.load(rows_ND + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    # What a maximum is where one of the numbers is NaN differs between devices: such a row is told apart first.
    finite = tl.min((tl.abs(values) <= _LARGEST).to(tl.int32), axis=0) == 1
    values = tl.where(finite, values, 0.0)
    most = tl.max(tl.abs(values), axis=0)
    base = tl.zeros([WIDTH], tl.float32)
    sign = -1.0
    at_held = column
    if HELD:
        at_held = tl.load(key_N + row) * width + column
        held = tl.load(held_SD + at_held, mask=inside, other=0.0).to(tl.float32)
        most_of_change = tl.max(tl.abs(values - held), axis=0)
        smaller = most_of_change < most
        base = tl.where(smaller, held, 0.0)
        most = tl.where(smaller, most_of_change, most)
        sign = tl.where(smaller, 1.0, -1.0)
    scale = tl.where(finite, tl.maximum(most / largest, _SMALLEST), float("nan"))
    codes = tl.where(finite, (values - base) / scale, 0.0)
    integers = (codes + _ROUNDING) - _ROUNDING
    coded = _to_e4m3(codes) if FLOAT else integers.to(tl.int8).to(tl.uint8, bitcast=True)
    start = coded_NW + row * (SCALE + width)
    tl.store(start + SCALE + column, coded, mask=inside)
    # Byte by byte: a row of any width may begin anywhere.
    bits = (scale * sign).to(tl.int32, bitcast=True)
    byte = tl.arange(0, SCALE)
    tl.store(start + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8))
    if HELD:
        decoded = _decoded(_code_values(coded, FLOAT), scale, base, held_SD)
        tl.store(held_SD + at_held, _finite_or_0(decoded), mask=inside)


@triton.jit
def _decode(
    coded_NW, held_SD, key_N, rows_ND, width, coded_stride,
    HELD: tl.constexpr, FLOAT: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    start = coded_NW + row * coded_stride
    byte = tl.arange(0, SCALE)
    # Different bits of one number: their sum is the number, the last of them its sign.
    bits = tl.sum(tl.load(start + byte).to(tl.int32) << (8 * byte), axis=0)
    scale = bits.to(tl.float32, bitcast=True)
    codes = _code_values(tl.load(start + SCALE + column, mask=inside, other=0), FLOAT)
    base = tl.zeros([WIDTH], tl.float32)
    at_held = column
    if HELD:
        at_held = tl.load(key_N + row) * width + column
        held = tl.load(held_SD + at_held, mask=inside, other=0.0).to(tl.float32)
        base = tl.where(scale > 0, held, 0.0)
    decoded = _decoded(codes, tl.abs(scale), base, rows_ND)
    tl.store(rows_ND + row * width + column, decoded, mask=inside)
    if HELD:
        tl.store(held_SD + at_held, _finite_or_0(decoded), mask=inside)


def encode_rows(rows_ND: Tensor, held: HeldRows | None, form: RowFormat) -> Tensor:
    num_rows, width = rows_ND.shape
    coded_NW = torch.empty(num_rows, SCALE_BYTES + width, dtype=torch.uint8, device=rows_ND.device)
    if num_rows:
        rows_ND = rows_apart(rows_ND)
        held_SD, key_N = _places(held, rows_ND)
        _encode[(num_rows,)](
            rows_ND, held_SD, key_N, coded_NW, width, rows_ND.stride(0), form.largest,
            HELD=held is not None, FLOAT=form.dtype.is_floating_point, SCALE=SCALE_BYTES,
            WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip
    return coded_NW


def decode_rows(coded_NW: Tensor, held: HeldRows | None, form: RowFormat, width: int, dtype: torch.dtype) -> Tensor:
    rows_ND = torch.empty(coded_NW.shape[0], width, dtype=dtype, device=coded_NW.device)
    if rows_ND.shape[0]:
        coded_NW = rows_apart(coded_NW)
        held_SD, key_N = _places(held, rows_ND)
        _decode[(rows_ND.shape[0],)](
            coded_NW, held_SD, key_N, rows_ND, width, coded_NW.stride(0),
            HELD=held is not None, FLOAT=form.dtype.is_floating_point, SCALE=SCALE_BYTES,
            WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip
    return rows_ND


def _places(held: HeldRows | None, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Something of the right kind where nothing is held."""
    if held is None:
        return rows_ND, rows_ND
    assert held.rows_SD.is_contiguous()
    return held.rows_SD, held.key_N.contiguous()

"""Rows as int8 codes: against a loop over values, the error of half a code, extremes, and rows that are not finite.

Shape suffixes: N rows, D hidden size.
"""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist.kernels.int8_rows import SCALE_BYTES, decode_rows, encode_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 24


def rows_of(num_rows: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some with an outlier, so that a row's largest value says little of the others."""
    draw = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(num_rows, WIDTH, generator=draw)
    rows_ND[::3, 0] *= 20
    return (rows_ND * scale).to(dtype)


def naive_codes(row: list[float]) -> tuple[np.float32, list[int]]:
    """One row, value by value, in fp32; round() takes ties to the even number."""
    scale = np.float32(max(abs(value) for value in row)) / np.float32(127)
    return scale, [round(float(np.float32(value) / scale)) for value in row]


@given(num_rows=st.integers(0, 7), seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_codes_match_the_loop(num_rows: int, seed: int, dtype: torch.dtype) -> None:
    rows_ND = rows_of(num_rows, seed, dtype=dtype)
    coded_NW = encode_rows(rows_ND)
    assert coded_NW.shape == (num_rows, SCALE_BYTES + WIDTH) and coded_NW.dtype == torch.uint8
    decoded_ND = decode_rows(coded_NW, dtype)
    assert decoded_ND.shape == rows_ND.shape and decoded_ND.dtype == dtype
    for row, coded, decoded in zip(rows_ND.tolist(), coded_NW.tolist(), decoded_ND, strict=True):
        scale, codes = naive_codes(row)
        assert struct.unpack(f"<f{WIDTH}b", bytes(coded)) == (scale, *codes)
        assert torch.equal(decoded, torch.tensor([np.float32(code) * scale for code in codes]).to(dtype))


@given(seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), exponent=st.integers(-30, 4))
@settings(max_examples=40, deadline=None)
def test_the_error_is_half_a_code(seed: int, dtype: torch.dtype, exponent: int) -> None:
    rows_ND = rows_of(6, seed, 2.0**exponent, dtype)
    exact_ND, decoded_ND = rows_ND.double(), decode_rows(encode_rows(rows_ND), dtype).double()
    bound_N1 = exact_ND.abs().amax(1, keepdim=True) / 254
    rounding_ND = exact_ND.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert ((decoded_ND - exact_ND).abs() <= bound_N1 * (1 + 1e-5) + rounding_ND).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_extremes(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max * (1.0 if dtype == torch.float16 else 0.9)
    rows_ND = torch.stack([torch.zeros(WIDTH), torch.full((WIDTH,), 1e-40), torch.full((WIDTH,), largest)]).to(dtype)
    decoded_ND = decode_rows(encode_rows(rows_ND), dtype)
    assert decoded_ND.isfinite().all() and not decoded_ND[0].any() and decoded_ND[1].abs().max() <= 1e-37
    torch.testing.assert_close(decoded_ND[2], rows_ND[2], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_breaks_itself_alone(broken: float, dtype: torch.dtype) -> None:
    """Nothing of it arrives as a finite number."""
    rows_ND = rows_of(3, 1, dtype=dtype)
    expected_ND = decode_rows(encode_rows(rows_ND), dtype)
    rows_ND[1, 5] = broken
    arrived_ND = decode_rows(encode_rows(rows_ND), dtype)
    assert not arrived_ND[1].isfinite().any()
    assert torch.equal(arrived_ND[[0, 2]], expected_ND[[0, 2]])

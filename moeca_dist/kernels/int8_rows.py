"""Rows as int8 codes with one fp32 scale each, by itself for every row.

The scale is that of the value of largest magnitude, which gets the code 127 or -127.

Shape suffixes: N rows, D hidden size, W bytes of a coded row: its scale, then D codes.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
LARGEST_CODE = 127


def encode_rows(rows_ND: Tensor) -> Tensor:
    """Return uint8 [N, W] of float rows.

    The scale of a row with an infinity or NaN is not finite. Nothing that is decoded with such a scale is finite.
    """
    # The vector norm of order infinity takes 20 times as long on CPU, and magnitudes as much memory as the rows.
    largest_N = torch.maximum(rows_ND.amax(1), -rows_ND.amin(1)).float()
    scale_N = (largest_N / LARGEST_CODE).clamp_(min=torch.finfo(torch.float32).tiny)
    codes_ND = (rows_ND / scale_N[:, None]).round_().to(torch.int8)
    return torch.cat([scale_N.view(torch.uint8).view(-1, SCALE_BYTES), codes_ND.view(torch.uint8)], 1)


def decode_rows(coded_NW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows [N, D] in ``dtype``."""
    scale_N = coded_NW[:, :SCALE_BYTES].flatten().view(torch.float32)
    return (coded_NW[:, SCALE_BYTES:].view(torch.int8) * scale_N[:, None]).to(dtype)

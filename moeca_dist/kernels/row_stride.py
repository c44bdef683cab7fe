"""The memory layout that every Triton kernel asks of its tensors."""

from torch import Tensor


def with_unit_stride(rows_XD: Tensor) -> Tensor:
    """Return the rows with unit stride inside. Chunks of a wider tensor are returned as they are."""
    return rows_XD if rows_XD.stride(-1) == 1 else rows_XD.contiguous()

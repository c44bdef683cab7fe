"""The dtypes in which cached values are stored: the computation's own, or a smaller one.

Values are rounded when they are stored. They return to the dtype of the computation when they are served. A step uses
the values that it computes itself without rounding.

Shape suffixes: D width of a row (hidden size, or channels of a head), N rows; ``X`` stands for any leading sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_FLOAT8 = torch.float8_e4m3fn
_LARGEST_FLOAT8 = torch.finfo(_FLOAT8).max
_SCALE_BYTES = 4


class Packed:
    """Rows [X, D] in the dtype of a ``Storage``.

    With float8 each row has one fp32 scale [X, 1], chosen by its largest value.
    """

    def __init__(self, data_XD: Tensor, scale_X1: Tensor | None, dtype: torch.dtype) -> None:
        self.data_XD = data_XD
        self.scale_X1 = scale_X1
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        return self.data_XD.shape

    @property
    def is_exact(self) -> bool:
        """Return whether stored rows come back unchanged."""
        return self.data_XD.dtype == self.dtype

    @property
    def exact(self) -> Tensor | None:
        """Return the stored rows if they are kept unchanged, else None."""
        return self.data_XD if self.is_exact else None

    def unpack(self) -> Tensor:
        """Return all rows in the dtype of the computation. If the rows are stored in that dtype, this is the stored
        tensor itself.
        """
        rows_XD = self.data_XD.to(self.dtype)
        return rows_XD if self.scale_X1 is None else rows_XD.mul_(self.scale_X1)

    def rows(self, index_N: Tensor) -> Tensor:
        """Return the rows ``index_N`` as [N, D] in the dtype of the computation."""
        data_ND = _flat(self.data_XD).index_select(0, index_N).view(self.data_XD.dtype)
        scale_N1 = None if self.scale_X1 is None else _flat(self.scale_X1).index_select(0, index_N)
        return Packed(data_ND, scale_N1, self.dtype).unpack()

    def put(self, index_N: Tensor, values_ND: Tensor) -> None:
        """Store ``values_ND`` as the rows ``index_N``."""
        packed = _packed(values_ND, self.data_XD.dtype)
        _flat(self.data_XD).index_copy_(0, index_N, _flat(packed.data_XD))
        if self.scale_X1 is not None and packed.scale_X1 is not None:
            _flat(self.scale_X1).index_copy_(0, index_N, packed.scale_X1)

    def stretched(self, before: Sequence[int], after: Sequence[int]) -> "Packed":
        """Return runs of ``before[p]`` rows lengthened to ``after[p]`` rows each, with zeros."""
        scale_X1 = None if self.scale_X1 is None else stretched(self.scale_X1, before, after)
        return Packed(stretched(self.data_XD, before, after), scale_X1, self.dtype)

    @property
    def num_bytes(self) -> int:
        held = [self.data_XD, *([] if self.scale_X1 is None else [self.scale_X1])]
        return sum(part.numel() * part.element_size() for part in held)


@dataclass(frozen=True)
class Storage:
    """A dtype for stored values. ``dtype`` None stores them as computed."""

    dtype: torch.dtype | None = None

    def pack(self, values_XD: Tensor) -> Packed:
        """Return ``values_XD`` packed. If packing changes nothing, the result shares their memory: do not write to
        them again.
        """
        return _packed(values_XD, self.dtype or values_XD.dtype)

    def zeros(self, shape: Sequence[int], like: Tensor) -> Packed:
        return self.pack(like.new_zeros(*shape))

    def row_bytes(self, width: int, element_bytes: int) -> int:
        """Return the bytes of one stored row.

        Args:
            width: number of values of the row.
            element_bytes: size of a value in the computation.
        """
        if self.dtype is None:
            return width * element_bytes
        return width * self.dtype.itemsize + (_SCALE_BYTES if self.dtype == _FLOAT8 else 0)


AS_COMPUTED: Final = Storage()


def storage_of(name: str) -> Storage:
    """Return the storage that ``cache.dtype`` names: "model" or a torch dtype."""
    return Storage(None if name == "model" else getattr(torch, name))


def _packed(values_XD: Tensor, dtype: torch.dtype) -> Packed:
    if dtype == _FLOAT8:
        smallest = torch.finfo(torch.float32).tiny
        scale_X1 = (values_XD.abs().amax(-1, keepdim=True).float() / _LARGEST_FLOAT8).clamp(min=smallest)
        return Packed((values_XD / scale_X1).to(_FLOAT8), scale_X1, values_XD.dtype)
    return Packed(values_XD.to(dtype), None, values_XD.dtype)


def _flat(part_XD: Tensor) -> Tensor:
    """Return [rows, D]. Float8 is returned as bytes, because few operators know it."""
    flat = part_XD.view(-1, part_XD.shape[-1])
    return flat.view(torch.uint8) if flat.dtype == _FLOAT8 else flat


def stretched(rows: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Lengthen runs of ``before[p]`` rows to ``after[p]`` rows each, with zeros."""
    parts = []
    for run, old, new in zip(rows.split(list(before)), before, after, strict=True):
        parts += [run, rows.new_zeros(new - old, *rows.shape[1:])]
    return torch.cat(parts)

"""How cached values are kept: as they were computed, or smaller.

What is stored smaller is rounded when it is stored and brought back to the dtype of the computation when it is served;
what a step computes is used as computed in that step.

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
    """Rows [X, D] in the dtype of a ``Storage``; float8 has one fp32 scale [X, 1] per row, by its largest value."""

    def __init__(self, data_XD: Tensor, scale_X1: Tensor | None, dtype: torch.dtype) -> None:
        self.data_XD = data_XD
        self.scale_X1 = scale_X1
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        return self.data_XD.shape

    @property
    def is_exact(self) -> bool:
        """Whether rows come back as they were put."""
        return self.data_XD.dtype == self.dtype

    @property
    def exact(self) -> Tensor | None:
        """The rows themselves where they are kept as they were put."""
        return self.data_XD if self.is_exact else None

    def unpack(self) -> Tensor:
        """All rows in the dtype of the computation; the stored tensor itself where that is its dtype."""
        rows_XD = self.data_XD.to(self.dtype)
        return rows_XD if self.scale_X1 is None else rows_XD.mul_(self.scale_X1)

    def rows(self, index_N: Tensor) -> Tensor:
        """[N, D] in the dtype of the computation."""
        data_ND = _flat(self.data_XD).index_select(0, index_N).view(self.data_XD.dtype)
        scale_N1 = None if self.scale_X1 is None else _flat(self.scale_X1).index_select(0, index_N)
        return Packed(data_ND, scale_N1, self.dtype).unpack()

    def put(self, index_N: Tensor, values_ND: Tensor) -> None:
        """Keep ``values_ND`` as the rows ``index_N`` of all."""
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
    """``dtype`` None: as computed."""

    dtype: torch.dtype | None = None

    def pack(self, values_XD: Tensor) -> Packed:
        """Where nothing changes, the values themselves: the caller leaves them alone from now on."""
        return _packed(values_XD, self.dtype or values_XD.dtype)

    def zeros(self, shape: Sequence[int], like: Tensor) -> Packed:
        return self.pack(like.new_zeros(*shape))

    def row_bytes(self, width: int, element_bytes: int) -> int:
        """Size of one row of ``width`` values that the computation has in ``element_bytes`` each."""
        if self.dtype is None:
            return width * element_bytes
        return width * self.dtype.itemsize + (_SCALE_BYTES if self.dtype == _FLOAT8 else 0)


AS_COMPUTED: Final = Storage()


def storage_of(name: str) -> Storage:
    """The storage that ``cache.dtype`` names: "model" or a torch dtype."""
    return Storage(None if name == "model" else getattr(torch, name))


def _packed(values_XD: Tensor, dtype: torch.dtype) -> Packed:
    if dtype == _FLOAT8:
        smallest = torch.finfo(torch.float32).tiny
        scale_X1 = (values_XD.abs().amax(-1, keepdim=True).float() / _LARGEST_FLOAT8).clamp(min=smallest)
        return Packed((values_XD / scale_X1).to(_FLOAT8), scale_X1, values_XD.dtype)
    return Packed(values_XD.to(dtype), None, values_XD.dtype)


def _flat(part_XD: Tensor) -> Tensor:
    """[rows, D]; float8 as bytes, because few operators know it."""
    flat = part_XD.view(-1, part_XD.shape[-1])
    return flat.view(torch.uint8) if flat.dtype == _FLOAT8 else flat


def stretched(rows: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Lengthen runs of ``before[p]`` rows to ``after[p]`` rows each, with zeros."""
    parts = []
    for run, old, new in zip(rows.split(list(before)), before, after, strict=True):
        parts += [run, rows.new_zeros(new - old, *rows.shape[1:])]
    return torch.cat(parts)

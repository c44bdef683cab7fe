"""A safetensors file that is written tensor by tensor and read lazily.

The library's own ``save_file`` needs every tensor at once, and a checkpoint larger than memory has to be streamed. So
the writer here follows the published file format: 8 bytes of little-endian header length, a JSON header, then the raw
tensors without gaps. The header is ``{key: {"dtype", "shape", "data_offsets"}}``.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeca_dist.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The dtype and shape of one tensor, known without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        return cls(tensor.dtype, tuple(tensor.shape))

    @classmethod
    def from_names(cls, dtype_name: str, shape: list[int]) -> "TensorInfo":
        """Return the info of a dtype name and a shape.

        Raises KeyError for a dtype name that no tensor of ours has (e.g. ``F8_E4M3``).
        """
        return cls(_DTYPES[dtype_name], tuple(shape))

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A memory-mapped ``.safetensors`` file. Only the header is read until :meth:`get` is called.

    Raises UserError naming the file if it is truncated, foreign or holds a dtype that no model here uses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = safe_open(str(path), framework="pt", device="cpu")
            slices = {key: self._handle.get_slice(key) for key in self._handle.keys()}  # noqa: SIM118 - not a dict
            self.infos = {key: TensorInfo.from_names(s.get_dtype(), s.get_shape()) for key, s in slices.items()}
            self.metadata: dict[str, str] = self._handle.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}): download or convert it again"
            ) from error
        except KeyError as error:
            raise UserError(f"{path} holds tensors of dtype {error}: convert them to float32 or bfloat16") from error

    def get(self, key: str) -> Tensor:
        """Return the tensor as a view of the mapped file. Its pages are read when it is used."""
        return self._handle.get_tensor(key)


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the tensors of ``infos``. ``read(key)`` is called for one tensor at a time and cast to the stated dtype.

    Raises ValueError if a tensor does not have the stated shape. Raises OSError as ``open`` and ``write`` do.
    """
    # Wider items first keeps every tensor aligned to its item size, as the format recommends.
    keys = sorted(infos, key=lambda key: -infos[key].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key in keys:
        end = offset + infos[key].nbytes
        header[key] = {
            "dtype": infos[key].dtype_name,
            "shape": list(infos[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for key in keys:
            tensor = read(key).detach().to(device="cpu", dtype=infos[key].dtype).contiguous()
            if tuple(tensor.shape) != infos[key].shape:
                raise ValueError(f"{key} has shape {tuple(tensor.shape)}, announced as {infos[key].shape}")
            tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)

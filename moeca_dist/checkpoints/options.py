"""The options of ``load_model``, checked by name and type before any file is opened."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeca_dist.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICES = ("auto", "cpu", "cuda")
_COUNTS = ("num_heads", "num_experts_per_tok", "n_group", "topk_group", "input_size")
MODEL_OPTIONS = ("family", *_COUNTS, "routed_scaling_factor")
_KNOWN = (*MODEL_OPTIONS, "dtype", "device")


@dataclass(frozen=True)
class LoadOptions:
    """Checked options. ``model`` holds only the stated hyper-parameters."""

    model: Mapping[str, Any]
    dtype: torch.dtype
    device: str | torch.device

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "LoadOptions":
        """Check the options and return them. None counts as not stated.

        Raises UserError for an unknown name (with the nearest known name) and for a wrong value.
        """
        for name in options:
            if name not in _KNOWN:
                close = difflib.get_close_matches(name, _KNOWN, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_KNOWN)}"
                raise UserError(f"unknown model option {name!r}: {hint}")
        stated = {name: value for name, value in options.items() if value is not None}
        model = {name: _checked(name, stated[name]) for name in MODEL_OPTIONS if name in stated}
        device = stated.get("device", "auto")
        if not isinstance(device, torch.device) and device not in _DEVICES:
            raise UserError(f"device is {device!r}: choose one of {', '.join(_DEVICES)}, or a torch.device")
        return cls(model, parse_dtype(stated.get("dtype", "float32")), device)

    def choose_device(self, mesh_device: torch.device | None) -> torch.device:
        """Return the device of the weights, which is the mesh's device if there is a mesh.

        Raises UserError for a device that this machine or the mesh does not have.
        """
        if self.device == "auto":
            return mesh_device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if mesh_device is not None and (
            device.type != mesh_device.type or device.index not in (None, mesh_device.index)
        ):
            raise UserError(f"device {device} is not the mesh's {mesh_device}: leave option device at auto")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch finds no CUDA device here: choose cpu or auto")
        return mesh_device or device


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype. Raises UserError for a dtype in which models do not run."""
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype))
    if chosen is None or chosen not in DTYPES.values():
        raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    return chosen


def _checked(name: str, value: Any) -> Any:
    if name == "family":
        return value  # compared with the checkpoint's own
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value <= 0 or (name in _COUNTS and not isinstance(value, int)):
        kind = "a positive integer" if name in _COUNTS else "a positive number"
        raise UserError(f"model option {name} is {value!r}: state {kind}")
    return value

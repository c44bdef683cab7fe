"""Which operators make the host wait for a CUDA device, and a walk that lists those of some work on CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero.", "item", "bincount", "masked_select", "is_nonzero", "equal.", "unique",
           "repeat_interleave.Tensor", "lift_fresh")  # fmt: skip
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class _Walk(TorchDispatchMode):
    """Lists the operators that on CUDA make the host wait for the device, or copy from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        by_mask = name.startswith("index.") and any(m is not None and m.dtype == torch.bool for m in args[1])
        written_by_mask = name.startswith("index_put") and any(m is not None and m.dtype == torch.bool for m in args[1])
        if (
            by_mask
            or written_by_mask
            or name.startswith(WAITING)
            or ((kwargs or {}).get("device") is not None and (name.startswith("_to_copy")))
        ):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def waits_of(work: Callable[[], Tensor]) -> list[str]:
    """Return what ``work`` reads on the host, and the operators in it that wait."""
    waits: list[str] = []
    with pytest.MonkeyPatch.context() as patch, _Walk() as walk:
        for name in READS:
            patch.setattr(Tensor, name, _noting(name, getattr(Tensor, name), waits))
        work()
    return waits + walk.waits


def _noting(name: str, read: Any, waits: list[str]) -> Any:
    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        waits.append(name)
        return read(self, *args, **kwargs)

    return noted

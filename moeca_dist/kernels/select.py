"""The one place that chooses kernels, by name."""

from importlib.util import find_spec
from typing import Literal

import torch

from moeca_dist.errors import UserError
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.types import Kernels

KernelsName = Literal["torch", "triton"]


def kernels_of(name: KernelsName, device: torch.device) -> Kernels:
    """Return the kernels that ``model.kernels`` names. Raises UserError if Triton cannot run on ``device``."""
    if name == "torch":
        return REFERENCE
    if find_spec("triton") is None:
        raise UserError("model.kernels triton: Triton is not installed; install it, or set model.kernels=torch")
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise UserError(f"model.kernels triton needs a CUDA device, not {device.type}: set model.kernels=torch")
    # Imported here: it needs Triton, which is not there on every platform.
    from moeca_dist.kernels.triton_kernels import TritonKernels

    return TritonKernels()

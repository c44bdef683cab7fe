"""The one place that chooses kernels: Triton for tensors on a CUDA device where it is installed, else PyTorch."""

from functools import cache
from importlib.util import find_spec

import torch

from moeca_dist.kernels.reference import ReferenceKernels
from moeca_dist.kernels.types import Kernels


def kernels_for(device: torch.device) -> Kernels:
    return _fused() if device.type == "cuda" and find_spec("triton") is not None else _plain()


@cache
def _plain() -> Kernels:
    return ReferenceKernels()


@cache
def _fused() -> Kernels:
    # Imported here: it needs Triton, which is not there on every platform.
    from moeca_dist.kernels.fused import FusedKernels

    return FusedKernels()

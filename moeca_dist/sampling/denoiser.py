"""The interface between a solver and the network: the denoiser's signature and the explicit step.

Shape suffixes: B images, C channels, H height, W width (latent or image pixels).
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from moeca_dist.types import StepContext


class Denoiser(Protocol):
    """A network with labels and guidance already bound. Solvers know nothing else of a model.

    ``x_BCHW`` and ``t_B`` are float32 on the sampling device. The result is ``[B, C_out, H, W]`` of any float dtype. B
    may be 0: a rank without images still takes part in the collectives inside the network.
    """

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, step: StepContext, /) -> Tensor: ...


OnStep = Callable[[StepContext], None]
"""Called after every finished step, for progress bars and logs."""

"""What travels between a solver and the network: the denoiser's signature and the explicit step.

Shape suffixes: B images, C channels, H height, W width (latent or image pixels).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class StepContext:
    """Where in the denoising loop a network evaluation stands.

    It is passed down as an argument, so nothing below a solver counts steps by itself: two samples can interleave, and
    a retried step is the same step.
    """

    index: int  # 0 for the first (noisiest) step, num_steps - 1 for the last, whatever the time convention
    num_steps: int
    time: float  # the value the network gets for every image: in [0, 1] (flow) or an integer in 0..999 (DDPM)


class Denoiser(Protocol):
    """A network with labels and guidance already bound: all that a solver knows of a model.

    ``x_BCHW`` and ``t_B`` are float32 on the sampling device; returns ``[B, C_out, H, W]`` of any float dtype.
    B may be 0: a rank without images still takes part in the collectives inside the network.
    """

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, step: StepContext, /) -> Tensor: ...


OnStep = Callable[[StepContext], None]
"""Called after every finished step, for progress bars and logs."""

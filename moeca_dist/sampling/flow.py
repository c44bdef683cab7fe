"""Rectified flow (Liu et al. 2022, algorithm 1): Euler steps along the predicted velocity, in both time conventions.

The state is float32, whatever the dtype of the network. Networks trained with a learned variance return 2C channels, of
which the first C are the velocity.

Shape suffixes: B images, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeca_dist.errors import UserError
from moeca_dist.sampling.denoiser import Denoiser, OnStep
from moeca_dist.sampling.noise import NoiseSource
from moeca_dist.types import StepContext


def sample_noise_to_data(
    denoise: Denoiser, noise: NoiseSource, shape_CHW: Sequence[int], num_steps: int, on_step: OnStep | None = None
) -> Tensor:
    """Sample with time from 0 (noise) to 1 (data) and v = data - noise: t = i/N, ``z += v/N`` (DSMoE).

    The denoiser is called ``num_steps`` times, even if there are no images.

    Returns:
        The samples, float32 ``[B, C, H, W]``.

    Raises:
        UserError: ``num_steps`` is below 1.
    """
    check_num_steps(num_steps)
    times = [index / num_steps for index in range(num_steps)]
    return _euler(denoise, noise.draw(shape_CHW), times, 1 / num_steps, on_step)


def sample_data_to_noise(
    denoise: Denoiser, noise: NoiseSource, shape_CHW: Sequence[int], num_steps: int, on_step: OnStep | None = None
) -> Tensor:
    """Sample with time from 1 (noise) to 0 (data) and v = noise - data (DiT-MoE XL/G).

    The times are t = 1, (N-1)/N, ..., 1/N, with ``z -= v/N``. Calls, result and errors are those of
    :func:`sample_noise_to_data`.
    """
    check_num_steps(num_steps)
    times = [(num_steps - index) / num_steps for index in range(num_steps)]
    return _euler(denoise, noise.draw(shape_CHW), times, -1 / num_steps, on_step)


def gains_noise_to_data(index: int, num_steps: int) -> tuple[float, float]:
    """Return a and b of ``next = a * state + b * output`` in :func:`sample_noise_to_data`.

    They are the same in every step.
    """
    return 1.0, 1 / num_steps


def gains_data_to_noise(index: int, num_steps: int) -> tuple[float, float]:
    """Return a and b of ``next = a * state + b * output`` in :func:`sample_data_to_noise`.

    They are the same in every step.
    """
    return 1.0, -1 / num_steps


def check_num_steps(num_steps: int) -> None:
    """Raise UserError unless an Euler path of ``num_steps`` steps exists."""
    if num_steps < 1:
        raise UserError(f"num_steps {num_steps} is too small; rectified-flow sampling needs at least 1 step")


def _euler(denoise: Denoiser, z_BCHW: Tensor, times: Sequence[float], dt: float, on_step: OnStep | None) -> Tensor:
    num_channels = z_BCHW.shape[1]
    for index, time in enumerate(times):
        step = StepContext(index=index, num_steps=len(times), time=time)
        t_B = torch.full((z_BCHW.shape[0],), time, dtype=torch.float32, device=z_BCHW.device)
        v_BCHW = denoise(z_BCHW, t_B, step)[:, :num_channels]
        z_BCHW = z_BCHW + dt * v_BCHW.float()
        if on_step is not None:
            on_step(step)
    return z_BCHW

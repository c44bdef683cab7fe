"""The published way to sample from a network: its solver, number of steps and guided channels.

Shape suffixes: B images, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeca_dist.errors import UserError
from moeca_dist.models.spec import ModelSpec, TimeConvention
from moeca_dist.sampling import ddpm, flow
from moeca_dist.sampling.denoiser import Denoiser, OnStep
from moeca_dist.sampling.guidance import Combine, Network, guided
from moeca_dist.sampling.noise import NoiseSource
from moeca_dist.types import Request

Gains = Callable[[int, int], tuple[float, float]]
"""(step index, number of steps) -> a and b such that the solver's next state is a * state + b * output + noise."""


class Solver(Protocol):
    """The signature that all solvers share."""

    def __call__(
        self,
        denoise: Denoiser,
        noise: NoiseSource,
        shape_CHW: Sequence[int],
        num_steps: int,
        on_step: OnStep | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """The solver of one network with its settings. It turns requests into samples and keeps no state."""

    solve: Solver
    check_num_steps: Callable[[int], None]  # raises UserError; lets entry points refuse before any work
    default_num_steps: int
    shape_CHW: tuple[int, int, int]
    null_label: int
    guided_channels: int
    gains: Gains

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        requests: Sequence[Request],
        *,
        cfg_scale: float,
        num_steps: int | None = None,
        device: torch.device | str = "cpu",
        on_step: OnStep | None = None,
        combine: Combine | None = None,
    ) -> Tensor:
        """Denoise one batch.

        ``network`` is called exactly once per step, with 2B rows (B if ``cfg_scale`` is 1), for any B. Ranks without
        images pass an empty ``requests`` and stay in step.

        Args:
            num_steps: the published count by default.
            combine: replaces plain guidance. It may remember the batch's outputs, so each batch needs its own.

        Returns:
            Latents or pixels in the order of ``requests``: float32 ``[B, C, H, W]`` on ``device``.

        Raises:
            UserError: the solver does not offer ``num_steps``.
        """
        num_steps = self.default_num_steps if num_steps is None else num_steps
        self.check_num_steps(num_steps)
        labels_B = torch.tensor([request.label for request in requests], dtype=torch.int64, device=device)
        denoise = guided(
            network,
            labels_B,
            cfg_scale=cfg_scale,
            null_label=self.null_label,
            guided_channels=self.guided_channels,
            combine=combine,
        )
        return self.solve(denoise, NoiseSource(requests, device), self.shape_CHW, num_steps, on_step)


def sampler_for(spec: ModelSpec) -> Sampler:
    """Return the sampler that the network's authors published.

    It takes 250 Euler steps for DSMoE, 50 for DiT-MoE XL/G, and 250 DDPM steps for DiT-MoE S/B. Guidance acts on all
    input channels, but in the DDPM path on the first three only.

    Raises:
        UserError: a DDPM network without variance channels, which ancestral sampling needs.
    """
    shape_CHW = (spec.in_channels, spec.input_size, spec.input_size)
    if spec.time_convention is TimeConvention.DDPM_EPSILON:
        if spec.out_channels != 2 * spec.in_channels:
            raise UserError(
                f"DDPM sampling needs a network with {2 * spec.in_channels} output channels (noise and variance), this "
                f"one has {spec.out_channels}; state a rectified-flow time convention if it was trained for one"
            )
        return Sampler(
            ddpm.sample,
            ddpm.check_num_steps,
            250,
            shape_CHW,
            spec.null_label,
            min(3, spec.in_channels),
            ddpm.gains,
        )
    solve: Solver = flow.sample_noise_to_data
    gains: Gains = flow.gains_noise_to_data
    default_num_steps = 250
    if spec.time_convention is TimeConvention.FLOW_DATA_TO_NOISE:
        solve, gains, default_num_steps = flow.sample_data_to_noise, flow.gains_data_to_noise, 50
    return Sampler(solve, flow.check_num_steps, default_num_steps, shape_CHW, spec.null_label, spec.in_channels, gains)

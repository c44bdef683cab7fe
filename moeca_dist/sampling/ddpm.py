"""Ancestral DDPM sampling with a learned-range variance on a respaced chain.

Sources: Ho et al. 2020 (DDPM, eqs. 6, 7 and algorithm 2) and Nichol & Dhariwal 2021 (Improved DDPM, eq. 15 and section
4). Betas are linear, 1e-4..0.02, with T = 1000. The network predicts noise, and x_0 is not clipped. Tables are float64,
the state is float32.

Shape suffixes: B images, C channels, H height, W width, S steps of the respaced chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeca_dist.errors import UserError
from moeca_dist.sampling.denoiser import Denoiser, OnStep
from moeca_dist.sampling.noise import NoiseSource
from moeca_dist.types import StepContext

NUM_TRAIN_TIMESTEPS = 1000
_BETA_FIRST, _BETA_LAST = 1e-4, 0.02


def check_num_steps(num_steps: int) -> None:
    """Raise UserError unless the chain can be respaced to ``num_steps``.

    One step is refused too. The respacing rule would keep timestep 0 alone, at which the input counts as almost clean.
    So pure noise would come back as the image.
    """
    if not 2 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UserError(f"num_steps {num_steps} is out of range; DDPM sampling takes 2..{NUM_TRAIN_TIMESTEPS} steps")


def respaced_timesteps(num_steps: int) -> list[int]:
    """Return the kept timesteps of 0..999, ascending: the first, the last, and others at rounded equal distances.

    The position is accumulated rather than multiplied out. Near ties the rounding then falls on the same side as in the
    published samplers. The two ways disagree for 21, 23, 27, ... steps.

    Raises:
        UserError: ``num_steps`` is outside 2..1000.
    """
    check_num_steps(num_steps)
    stride = (NUM_TRAIN_TIMESTEPS - 1) / (num_steps - 1)
    timesteps, position = [], 0.0
    for _ in range(num_steps):
        timesteps.append(round(position))
        position += stride
    return timesteps


@dataclass(frozen=True)
class RespacedDiffusion:
    """The chain that visits ``timesteps`` only, and its posterior q(x_{t-1} | x_t, x_0), with one entry per kept step.

    Entry 0 is the last step of sampling, the one with least noise.
    """

    timesteps: tuple[int, ...]
    sqrt_recip_alphas_bar_S: np.ndarray  # x_0 = this * x_t ...
    sqrt_recipm1_alphas_bar_S: np.ndarray  # ... - this * epsilon
    mean_coef_x0_S: np.ndarray
    mean_coef_xt_S: np.ndarray
    log_betas_S: np.ndarray  # upper end of the variance range
    log_posterior_variance_S: np.ndarray  # lower end

    @classmethod
    def of(cls, num_steps: int) -> "RespacedDiffusion":
        """Return the chain respaced to ``num_steps``. Its betas keep alpha-bar at every kept timestep.

        Raises:
            UserError: ``num_steps`` is outside 2..1000.
        """
        timesteps = respaced_timesteps(num_steps)
        alphas_bar_all = np.cumprod(1.0 - np.linspace(_BETA_FIRST, _BETA_LAST, NUM_TRAIN_TIMESTEPS, dtype=np.float64))
        alphas_bar_S = alphas_bar_all[timesteps]
        alphas_bar_prev_S = np.concatenate([[1.0], alphas_bar_S[:-1]])
        alphas_S = alphas_bar_S / alphas_bar_prev_S
        betas_S = 1.0 - alphas_S
        posterior_variance_S = betas_S * (1.0 - alphas_bar_prev_S) / (1.0 - alphas_bar_S)
        # The posterior at entry 0 is a point (its log is -inf), so the range starts at its neighbour's variance.
        posterior_variance_S[0] = posterior_variance_S[1]
        return cls(
            timesteps=tuple(timesteps),
            sqrt_recip_alphas_bar_S=np.sqrt(1.0 / alphas_bar_S),
            sqrt_recipm1_alphas_bar_S=np.sqrt(1.0 / alphas_bar_S - 1.0),
            mean_coef_x0_S=betas_S * np.sqrt(alphas_bar_prev_S) / (1.0 - alphas_bar_S),
            mean_coef_xt_S=(1.0 - alphas_bar_prev_S) * np.sqrt(alphas_S) / (1.0 - alphas_bar_S),
            log_betas_S=np.log(betas_S),
            log_posterior_variance_S=np.log(posterior_variance_S),
        )

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def posterior(self, output_BCHW: Tensor, x_BCHW: Tensor, entry: int) -> tuple[Tensor, Tensor]:
        """Return the mean and log variance of p(x_{t-1} | x_t), both float32.

        Args:
            output_BCHW: [B, 2C, H, W]. The first half is epsilon. The second half interpolates the log variance from
                beta-tilde at -1 to beta at 1 (Improved DDPM, eq. 15).
            x_BCHW: the state, float32.
            entry: position in the chain, 0 for the least noisy.
        """
        epsilon_BCHW, range_BCHW = output_BCHW.float().chunk(2, dim=1)
        upper = float(self.log_betas_S[entry])
        lower = float(self.log_posterior_variance_S[entry])
        fraction_BCHW = (range_BCHW + 1) / 2
        log_variance_BCHW = fraction_BCHW * upper + (1 - fraction_BCHW) * lower
        x0_BCHW = (
            float(self.sqrt_recip_alphas_bar_S[entry]) * x_BCHW
            - float(self.sqrt_recipm1_alphas_bar_S[entry]) * epsilon_BCHW
        )
        mean_BCHW = float(self.mean_coef_x0_S[entry]) * x0_BCHW + float(self.mean_coef_xt_S[entry]) * x_BCHW
        return mean_BCHW, log_variance_BCHW

    def gains(self, entry: int) -> tuple[float, float]:
        """Return a and b such that the posterior's mean at ``entry`` is ``a * state + b * epsilon``."""
        from_x0 = float(self.mean_coef_x0_S[entry])
        of_state = from_x0 * float(self.sqrt_recip_alphas_bar_S[entry]) + float(self.mean_coef_xt_S[entry])
        return of_state, -from_x0 * float(self.sqrt_recipm1_alphas_bar_S[entry])


def gains(index: int, num_steps: int) -> tuple[float, float]:
    """Return a and b such that step ``index`` of :func:`sample` is ``a * state + b * epsilon + noise``."""
    return RespacedDiffusion.of(num_steps).gains(num_steps - 1 - index)


def sample(
    denoise: Denoiser, noise: NoiseSource, shape_CHW: Sequence[int], num_steps: int, on_step: OnStep | None = None
) -> Tensor:
    """Sample from the noisiest kept timestep down to 0 (ancestral sampling: DDPM, algorithm 2).

    The network gets the original timestep (0..999, as float32). Step noise continues each image's own stream. The last
    step adds no noise. The denoiser is called ``num_steps`` times, even if there are no images.

    Returns:
        The samples, float32 ``[B, C, H, W]``.

    Raises:
        UserError: ``num_steps`` is outside 2..1000.
    """
    diffusion = RespacedDiffusion.of(num_steps)
    x_BCHW = noise.draw(shape_CHW)
    for index, entry in enumerate(reversed(range(num_steps))):
        step = StepContext(index=index, num_steps=num_steps, time=float(diffusion.timesteps[entry]))
        t_B = torch.full((x_BCHW.shape[0],), step.time, dtype=torch.float32, device=x_BCHW.device)
        x_BCHW, log_variance_BCHW = diffusion.posterior(denoise(x_BCHW, t_B, step), x_BCHW, entry)
        if entry > 0:
            x_BCHW = x_BCHW + torch.exp(0.5 * log_variance_BCHW) * noise.draw(shape_CHW)
        if on_step is not None:
            on_step(step)
    return x_BCHW

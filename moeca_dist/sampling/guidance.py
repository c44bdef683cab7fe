"""Classifier-free guidance (Ho & Salimans 2022, eq. 6) over conditional and unconditional halves in one batch.

Shape suffixes: B images, N network rows (B, or 2B with guidance), C channels, H height, W width.
"""

from typing import Protocol

import torch
from torch import Tensor

from moeca_dist.cache.session import CacheSession, StepCache
from moeca_dist.sampling.step import Denoiser
from moeca_dist.types import StepContext


class Network(Protocol):
    """A class-conditional network that also gets the step: ``(x_NCHW, t_N, y_N, step) -> output [N, C_out, H, W]``."""

    def __call__(self, x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, step: StepContext, /) -> Tensor: ...


class Model(Protocol):
    """A model without a cache: ``(x_NCHW, t_N, y_N) -> output [N, C_out, H, W]``."""

    def __call__(self, x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, /) -> Tensor: ...


class CachedModel(Protocol):
    """A model that also takes the caches of one step."""

    def __call__(self, x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, cache: StepCache, /) -> Tensor: ...


def exact(model: Model) -> Network:
    """The network that computes everything in every step: ``model`` needs no step, because nothing is cached."""

    def network(x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, step: StepContext, /) -> Tensor:
        return model(x_NCHW, t_N, y_N)

    return network


def cached(model: CachedModel, session: CacheSession) -> Network:
    """The network that serves from the caches of ``session`` what its policy does not compute."""

    def network(x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, step: StepContext, /) -> Tensor:
        return model(x_NCHW, t_N, y_N, session.at(step))

    return network


def guided(network: Network, labels_B: Tensor, *, cfg_scale: float, null_label: int, guided_channels: int) -> Denoiser:
    """Bind ``labels_B`` (int64) and guidance to ``network``.

    One call of the denoiser is one call of the network on 2B rows: rows 0..B-1 conditional, rows B..2B-1 the same
    images with ``null_label``. The first ``guided_channels`` output channels become
    ``uncond + cfg_scale * (cond - uncond)``; the others (a variance, or the fourth noise channel of DiT-MoE's DDPM
    path) are those of the conditional half, as in the published samplers, which keep only that half's images.
    With ``cfg_scale == 1`` the unconditional half would have no weight and is not computed: one call on B rows.
    """
    if cfg_scale == 1.0:

        def conditional(x_BCHW: Tensor, t_B: Tensor, step: StepContext, /) -> Tensor:
            return network(x_BCHW, t_B, labels_B, step)

        return conditional

    labels_N = torch.cat([labels_B, torch.full_like(labels_B, null_label)])

    def both_halves(x_BCHW: Tensor, t_B: Tensor, step: StepContext, /) -> Tensor:
        output_NCHW = network(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), labels_N, step)
        cond_BCHW, uncond_BCHW = output_NCHW.chunk(2)
        guided_cond, other = cond_BCHW[:, :guided_channels], cond_BCHW[:, guided_channels:]
        guided_uncond = uncond_BCHW[:, :guided_channels]
        return torch.cat([guided_uncond + cfg_scale * (guided_cond - guided_uncond), other], dim=1)

    return both_halves

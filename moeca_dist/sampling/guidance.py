"""Classifier-free guidance (Ho & Salimans 2022, eq. 6) over conditional and unconditional halves in one batch.

Shape suffixes: B images, N network rows (B, or 2B with guidance), C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeca_dist.cache.session import CacheSession, StepCache
from moeca_dist.sampling.denoiser import Denoiser
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


class Combine(Protocol):
    """A function that makes one output of the halves.

    It gets the halves' guided channels, conditional first, and the state for which they were computed.
    """

    def __call__(self, halves: Sequence[Tensor], x_BCHW: Tensor, step: StepContext, /) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance alone: ``uncond + scale * (cond - uncond)``. A single half is passed through."""

    scale: float

    def __call__(self, halves: Sequence[Tensor], x_BCHW: Tensor, step: StepContext, /) -> Tensor:
        if len(halves) == 1:
            return halves[0]
        cond_BCHW, uncond_BCHW = halves
        return uncond_BCHW + self.scale * (cond_BCHW - uncond_BCHW)


def exact(model: Model) -> Network:
    """Return a network that computes everything in every step. ``model`` needs no step, because nothing is cached."""

    def network(x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, step: StepContext, /) -> Tensor:
        return model(x_NCHW, t_N, y_N)

    return network


def cached(model: CachedModel, session: CacheSession) -> Network:
    """Return a network that computes what the policy of ``session`` chooses and serves the rest from its caches."""

    def network(x_NCHW: Tensor, t_N: Tensor, y_N: Tensor, step: StepContext, /) -> Tensor:
        return model(x_NCHW, t_N, y_N, session.at(step))

    return network


def guided(
    network: Network,
    labels_B: Tensor,
    *,
    cfg_scale: float,
    null_label: int,
    guided_channels: int,
    combine: Combine | None = None,
) -> Denoiser:
    """Bind ``labels_B`` (int64) and guidance to ``network``.

    One call of the denoiser is one call of the network on 2B rows. Rows 0..B-1 are conditional. Rows B..2B-1 are the
    same images with ``null_label``. If ``cfg_scale == 1``, the unconditional half would have no weight and is not
    computed: one call on B rows.

    ``combine`` makes the first ``guided_channels`` output channels of the halves, with plain guidance by default. The
    other channels are those of the conditional half: a variance, or the fourth noise channel of DiT-MoE's DDPM path.
    The published samplers keep only that half's images, too.
    """
    labels = [labels_B] if cfg_scale == 1 else [labels_B, torch.full_like(labels_B, null_label)]
    labels_N = torch.cat(labels)
    combine = combine or Guidance(cfg_scale)

    def denoise(x_BCHW: Tensor, t_B: Tensor, step: StepContext, /) -> Tensor:
        x_NCHW, t_N = torch.cat([x_BCHW] * len(labels)), torch.cat([t_B] * len(labels))
        halves = network(x_NCHW, t_N, labels_N, step).chunk(len(labels))
        guided_BCHW = combine([half[:, :guided_channels] for half in halves], x_BCHW[:, :guided_channels], step)
        others_BCHW = halves[0][:, guided_channels:]
        return torch.cat([guided_BCHW, others_BCHW.to(guided_BCHW.dtype)], dim=1)

    return denoise

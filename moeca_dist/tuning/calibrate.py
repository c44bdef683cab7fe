"""Calibration of a cached run: exact trajectories once, then the weights that bring the cached ones closest to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeca_dist.calibration.correction import DEFAULT_HISTORY, Corrected, OutputMemory, OutputWeights
from moeca_dist.calibration.file import Calibration
from moeca_dist.calibration.fit import Fitted, Recorded
from moeca_dist.errors import UserError
from moeca_dist.evaluation.paired import psnr_db, squared_error, unit_images
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.report.schema import FlopsReport
from moeca_dist.runtime.engine import Engine
from moeca_dist.sampling.guidance import Guidance
from moeca_dist.types import Request


@dataclass(frozen=True)
class Closeness:
    """How close a run's samples are to the exact ones; ``psnr_db`` (mean over images) for pixels, else None."""

    rel_l2: float
    psnr_db: float | None

    def __str__(self) -> str:
        decibels = "" if self.psnr_db is None else f"{self.psnr_db:.1f} dB PSNR, "
        return f"{decibels}relative L2 {self.rel_l2:.2g}"


@dataclass(frozen=True)
class Outcome:
    """``before`` and ``after``: without and with the calibration, on images that it has not seen."""

    calibration: Calibration
    before: Closeness
    after: Closeness


def calibrate(engine: Engine, requests: Sequence[Request], held_out: Sequence[Request]) -> Outcome:
    """Fit output weights for ``engine``'s cache on ``requests`` and measure them on ``held_out``.

    All images of each list make one batch. A collective of the world: all ranks call it with the same lists. The
    exact trajectory is kept meanwhile: two states per step, image and rank.

    Raises UserError for a configuration without a cache or with a calibration already, and for labels and seeds as
    ``Engine.generate`` does.
    """
    if engine.policy is None:
        raise UserError("cache.policy none has nothing to calibrate: name a policy")
    if engine.calibration is not None:
        raise UserError("cache.calibration is set already: remove it to fit a new one")
    if not engine.policy.is_scheduled:
        raise UserError(
            f"cache.policy {engine.policy.name} places its full steps while it runs: it takes no calibration"
        )
    for each in (requests, held_out):
        engine.plan.check_requests(each)
    share = share_of(engine, requests)
    fitted = fit(engine, share, record(engine, share)).fitted
    share = share_of(engine, held_out)
    exact_BCHW = engine.without_cache().denoise(share)
    before = _closeness(engine, engine.denoise(share), exact_BCHW)
    after = _closeness(engine, engine.denoise(share, corrected(engine, fitted.weights)), exact_BCHW)
    fitted_on: dict[str, Any] = {
        "num_images": len(requests),
        "seeds": sorted({request.seed for request in requests}),
        "held_out": {"num_images": len(held_out), "seeds": sorted({request.seed for request in held_out})},
        "before": vars(before),
        "after": vars(after),
    }
    return Outcome(Calibration(engine.fitted_for(), fitted.weights, fitted_on), before, after)


def record(engine: Engine, share: Sequence[Request], *, keep_halves: bool = False) -> "Recording":
    """The exact trajectories of this rank's images. A collective of the world."""
    exact = Recorded(Guidance(engine.config.sampling.cfg_scale), keep_halves)
    samples_BCHW = engine.without_cache().denoise(share, exact)
    return Recording(exact, samples_BCHW)


def fit(engine: Engine, share: Sequence[Request], recording: "Recording") -> "FittedRun":
    """Run ``engine`` on the recorded images while its weights are fitted. A collective of the world."""
    assert engine.policy is not None
    memory = OutputMemory(engine.policy.is_full, DEFAULT_HISTORY)
    reduce = partial(summed, engine.mesh)
    fitted = Fitted(recording.exact.guidance, memory, recording.exact, engine.sampler.gains, reduce)
    return FittedRun(fitted, *engine.denoise_counting(share, fitted))


@dataclass(frozen=True)
class Recording:
    """``samples_BCHW``: where the exact trajectories end."""

    exact: Recorded
    samples_BCHW: Tensor


@dataclass(frozen=True)
class FittedRun:
    """Samples and work of the cached run whose weights were fitted."""

    fitted: Fitted
    samples_BCHW: Tensor
    flops: FlopsReport


def corrected(engine: Engine, weights: OutputWeights) -> Corrected:
    """``weights`` for one batch of ``engine``."""
    assert engine.policy is not None
    memory = OutputMemory(engine.policy.is_full, weights.history)
    return Corrected(Guidance(engine.config.sampling.cfg_scale), weights, memory)


def share_of(engine: Engine, requests: Sequence[Request]) -> Sequence[Request]:
    """What this rank takes of one batch over all ranks."""
    rank, size = engine.mesh.rank, engine.mesh.world_size
    return requests[rank * len(requests) // size : (rank + 1) * len(requests) // size]


def summed(mesh: Mesh, part: Tensor) -> Tensor:
    """The sum over all ranks, added in rank order so that it is the same everywhere; on the host with several."""
    if mesh.world is None:
        return part
    return torch.stack(mesh.world.gather_objects(part.cpu())).sum(0)


def _closeness(engine: Engine, samples_BCHW: Tensor, exact_BCHW: Tensor) -> Closeness:
    decibels = torch.zeros((), dtype=torch.float64)
    if not engine.model.spec.is_latent:
        decibels = psnr_db(squared_error(unit_images(samples_BCHW), unit_images(exact_BCHW))).sum()
    difference = (samples_BCHW - exact_BCHW).double().square().sum()
    energy = exact_BCHW.double().square().sum()
    mine = torch.stack([difference.cpu(), energy.cpu(), decibels.cpu(), torch.tensor(float(len(samples_BCHW)))])
    off, whole, total_db, count = summed(engine.mesh, mine.double()).tolist()
    return Closeness((off / whole) ** 0.5, None if engine.model.spec.is_latent else total_db / count)

"""Runs of ``pareto.py``: one batch of noise through the exact network and through every configuration.

Shape suffixes: B images of one batch, C channels, H and W pixels.
"""

import base64
import hashlib
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common.unrounded import Unrounded
from moeca_dist import load_model
from moeca_dist.config import CacheConfig, Config
from moeca_dist.evaluation.paired import squared_error, ssim, unit_images
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.engine import Engine
from moeca_dist.sampling.latent_decoder import to_uint8
from moeca_dist.types import Request

# A fresh exact run at least once in so many runs: ratios are between neighbours in time, on machines that are shared.
EXACT_EVERY = 16

Unit = tuple[int, int]  # (seed, index of the batch)
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a record depends on besides its configuration; records of other settings are not mixed with these."""

    checkpoint: str
    checkpoint_sha256: str
    commit: str
    num_images: int
    seeds: tuple[int, ...]
    num_steps: int
    cfg_scale: float
    batch_size: int

    @property
    def units(self) -> list[Unit]:
        batches = range(-(-self.num_images // self.batch_size))
        return [(seed, batch) for seed in self.seeds for batch in batches]

    def requests(self, unit: Unit) -> list[Request]:
        """The batch's requests; the labels are the ten digits in turn."""
        seed, batch = unit
        first = batch * self.batch_size
        return [Request(i, i % 10, seed) for i in range(first, min(first + self.batch_size, self.num_images))]


@dataclass(frozen=True)
class Job:
    """One configuration: its cache, and how many steps it takes."""

    name: str
    cache: CacheConfig
    num_steps: int

    @property
    def options(self) -> dict[str, Any]:
        """What tells two configurations of one name apart, as JSON keeps it."""
        options = {"num_steps": self.num_steps} | self.cache.model_dump(mode="json", exclude_none=True)
        # Where the file lies is this machine's business.
        return options | ({"calibration": "fitted"} if self.cache.calibration else {})


@dataclass(frozen=True)
class Run:
    samples_BCHW: Tensor
    seconds: float
    flops: int
    refreshed: int
    cache_bytes: int


def run(model: DiffusionTransformer, job: Job, requests: Sequence[Request], cfg_scale: float) -> Run:
    """Sample one batch and count what it took."""
    sampling = {"num_steps": job.num_steps, "cfg_scale": cfg_scale, "batch_size": len(requests)}
    config = Config.model_validate({"cache": job.cache, "sampling": sampling})
    samples_BCHW, report = Engine(config, Mesh.single(), model, Unrounded()).generate(requests)
    return Run(
        samples_BCHW=torch.from_numpy(samples_BCHW),
        seconds=report.denoise_s,
        flops=report.flops.computed,
        refreshed=report.branches.refreshed,
        cache_bytes=report.cache.bytes_peak,
    )


def records(
    settings: Settings, exact_job: Job, jobs: Sequence[Job], done: Mapping[str, set[Unit]], keep_exact: bool
) -> Iterator[Record]:
    """One record for each configuration and batch that is not ``done``, in an order drawn anew for every batch.

    The exact runs in between are recorded too where ``keep_exact``: one process does it for all.
    """
    torch.set_num_threads(1)
    model = load_model(settings.checkpoint, device="cpu")
    warm = Job("warm-up", exact_job.cache, 2)
    run(model, warm, settings.requests(settings.units[0]), settings.cfg_scale)
    for unit in settings.units:
        wanted = [job for job in jobs if unit not in done.get(job.name, ())]
        exact_missing = keep_exact and unit not in done.get(exact_job.name, ())
        if not wanted and not exact_missing:
            continue
        requests = settings.requests(unit)
        reference = run(model, exact_job, requests, settings.cfg_scale)
        if exact_missing:
            yield _record(exact_job, unit, reference, reference, reference.seconds)
        random.Random(str(unit)).shuffle(wanted)
        exact_s = reference.seconds
        for position, job in enumerate(wanted):
            if position and position % EXACT_EVERY == 0:
                exact_s = run(model, exact_job, requests, settings.cfg_scale).seconds
            yield _record(job, unit, run(model, job, requests, settings.cfg_scale), reference, exact_s)


def seconds_per_run(settings: Settings, jobs: Iterable[Job], num_images: int = 2) -> dict[str, float]:
    """Seconds of every configuration on a few images: what the estimate is made of, and a trial of every row."""
    torch.set_num_threads(1)
    model = load_model(settings.checkpoint, device="cpu")
    requests = settings.requests(settings.units[0])[:num_images]
    return {job.name: run(model, job, requests, settings.cfg_scale).seconds for job in jobs}


def _record(job: Job, unit: Unit, made: Run, reference: Run, exact_s: float) -> Record:
    """``seconds`` beside ``exact_s`` of the nearest exact run before it; per-image metrics from the float samples."""
    x_BCHW, y_BCHW = unit_images(made.samples_BCHW), unit_images(reference.samples_BCHW)
    return {
        "name": job.name,
        "options": job.options,
        "seed": unit[0],
        "batch": unit[1],
        "seconds": made.seconds,
        "exact_s": exact_s,
        "flops": made.flops,
        "exact_flops": reference.flops,
        "branches_refreshed": made.refreshed,
        "exact_branches": reference.refreshed,
        "cache_bytes_per_image": made.cache_bytes / len(x_BCHW),
        "squared_error": squared_error(x_BCHW, y_BCHW).tolist(),
        "energy": y_BCHW.square().flatten(1).mean(1).tolist(),
        "ssim": ssim(x_BCHW, y_BCHW).tolist(),
        "images": packed(to_uint8(made.samples_BCHW).numpy()),
    }


def packed(images_NHWC: NDArray[np.uint8]) -> dict[str, Any]:
    """Pictures as text for a JSON line; ``pareto_report.unpacked`` reads it."""
    data = base64.b64encode(zlib.compress(images_NHWC.tobytes())).decode()
    return {"shape": list(images_NHWC.shape), "data": data}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

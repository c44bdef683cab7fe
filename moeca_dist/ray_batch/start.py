"""The start of a batch from its options: check everything that can be checked, connect to Ray, generate."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.ray_batch.cluster import GangShape, Strategy, connect, has_gpus
from moeca_dist.ray_batch.driver import Batch, run_batch
from moeca_dist.ray_batch.gang import GangPlan
from moeca_dist.ray_batch.identity import batch_identity, check_same
from moeca_dist.ray_batch.jobs import JobsFile, LabelCycle
from moeca_dist.ray_batch.ledger import Plan
from moeca_dist.ray_batch.manifest import MANIFEST, read_identity
from moeca_dist.ray_batch.worker import Worker
from moeca_dist.report.schema import Report
from moeca_dist.runtime.run_plan import RunPlan
from moeca_dist.types import Request

logger = logging.getLogger(__name__)

MAX_TRIES = 3


@dataclass(frozen=True)
class Options:
    """The options of a batch. Times are in seconds.

    ``bundles`` is the number of ranks of each bundle of a gang. ``jobs`` takes the place of ``num_images``, ``labels``
    (None: all classes) and ``seed``.
    """

    config: Config
    folder: Path
    resume: bool
    jobs: Path | None
    num_images: int
    labels: Sequence[range] | None
    seed: int
    gangs: int
    bundles: tuple[int, ...]
    strategy: Strategy
    address: str
    dashboard: bool
    start_timeout_s: float
    progress_timeout_s: float
    placement_timeout_s: float
    worker: type[Worker] = Worker


def start_batch(options: Options) -> Report:
    """Check, connect, generate, assemble, and leave Ray.

    Raises UserError for wrong options, before any work, and the errors of ``driver.run_batch``.
    """
    _check_folder(options.folder, options.resume)
    recorded = read_identity(options.folder) if options.resume else None
    _check_telemetry(options.config)
    plan = RunPlan.resolve(options.config, sum(options.bundles))
    plan.check_requests([Request(index, part[-1]) for index, part in enumerate(options.labels or ())])
    config, spec = plan.config, plan.spec
    source: JobsFile | LabelCycle
    if options.jobs is not None:
        source = JobsFile(options.jobs)
        num_images = source.count_images(spec.num_classes)
    else:
        num_images = options.num_images
        source = LabelCycle(num_images, options.labels or [range(spec.num_classes)], options.seed)

    def identity(device: str) -> dict[str, Any]:
        return batch_identity(config, source, num_images, sum(options.bundles), device)

    device = config.model.device
    if recorded is not None:
        # Refused before a cluster is started; a device that is left open is that of the batch.
        device = recorded["identity"]["device"] if device == "auto" else device
        check_same(recorded["identity"], identity(device))
    try:
        started = connect(options.address, options.gangs, sum(options.bundles), dashboard=options.dashboard)
        if device == "auto":
            device = "cuda" if has_gpus() else "cpu"
        on_device = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
        chunk_size = config.sampling.batch_size * sum(options.bundles)
        _make_folder(options.folder)
        return run_batch(
            Batch(
                config,
                Plan(options.folder, source, num_images, chunk_size, MAX_TRIES, identity(device)),
                GangPlan(
                    on_device,
                    GangShape(options.bundles, options.strategy, on_gpu=device == "cuda"),
                    options.start_timeout_s,
                    options.progress_timeout_s,
                    options.worker,
                ),
                options.gangs,
                fixed_cluster=started,
                placement_timeout_s=options.placement_timeout_s,
            )
        )
    finally:
        ray.shutdown()


def _check_telemetry(config: Config) -> None:
    for name, value in config.telemetry.model_dump().items():
        if value is not None:
            raise UserError(
                f"telemetry.{name} has no effect in batches: remove it; Ray's metrics show each GPU's memory and "
                "power, and moeca generate samples and traces a run of one gang's size"
            )


def _check_folder(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output folder {folder} is a file: choose another place with --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        if resume:
            logger.warning("%s holds nothing to resume: the batch starts anew", folder)
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"the output folder {folder} is not empty and holds no batch: choose another one with --out")
    if not resume:
        raise UserError(f"{folder} holds a batch: go on with it with --resume, or choose another --out")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another output folder with --out"
        ) from None

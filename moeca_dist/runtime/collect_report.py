"""The report of a run: what every rank counted, brought together."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.calibration.correction import OutputMemory
from moeca_dist.parallel.collectives import Collectives
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.report.schema import CacheReport, ExchangeReport, Report, describe_requests
from moeca_dist.runtime.run_plan import RunPlan
from moeca_dist.telemetry.gpu import GpuRecord, merge
from moeca_dist.telemetry.observer import RunObserver
from moeca_dist.timing import Seconds, Section
from moeca_dist.types import Request, StepContext

logger = logging.getLogger(__name__)


@dataclass
class RunCounters:
    """The counters of one run on this rank."""

    observer: RunObserver
    started: float = field(default_factory=time.perf_counter)
    denoise_s: float = 0.0
    cache: CacheStatistics = field(default_factory=CacheStatistics)

    def end_step(
        self, step: StepContext, session: CacheSession | None, memory: OutputMemory | None, group: Collectives | None
    ) -> None:
        """Count what a step took and left behind: its seconds, what is kept now, and what was sent."""
        self.observer.end_step(step.index)
        if session is not None:
            session.note_peak(bytes_beside=0 if memory is None else memory.num_bytes)
        if group is not None:
            self.cache.note_bytes(step.index, group.traffic.bytes_sent)


@dataclass(frozen=True)
class _RankResult:
    """The results that one rank tells the others at the end of a run."""

    cache: CacheStatistics
    denoise_s: float
    seconds: dict[tuple[int, Section], float]
    bytes_sent: int
    bytes_exact: int
    gpu: GpuRecord | None


def collect_report(plan: RunPlan, mesh: Mesh, requests: Sequence[Request], counters: RunCounters) -> Report:
    """Return the report of a run, on every rank. A collective of the world."""
    num_images, config, group = len(requests), plan.config, mesh.expert_group
    mine = _RankResult(
        counters.cache,
        counters.denoise_s,
        counters.observer.seconds.per_step(),
        group.traffic.bytes_sent if group else 0,
        int(group.traffic.bytes_exact) if group else 0,
        counters.observer.gpu_record(),
    )
    ranks = mesh.world.gather_objects(mine) if mesh.world is not None else [mine]
    statistics = CacheStatistics()
    for theirs in ranks:
        statistics.merge(theirs.cache)
    figures = plan.figures(num_images, statistics)
    wall_s = time.perf_counter() - counters.started
    remark = None if plan.policy is None else plan.policy.remark(statistics)
    if remark is not None and mesh.rank == 0:
        logger.warning(remark)
    return Report(
        num_images=num_images,
        world_size=mesh.world_size,
        ep_size=mesh.ep_size,
        dp_size=mesh.dp_size,
        num_steps=plan.num_steps,
        wall_s=wall_s,
        denoise_s=max(theirs.denoise_s for theirs in ranks),
        images_per_s=num_images / wall_s,
        flops=figures.flops(),
        branches=figures.branches(),
        exchange=ExchangeReport(
            mode="local" if group is None else "exact",
            location=plan.location,
            bytes_sent=sum(theirs.bytes_sent for theirs in ranks),
            bytes_full=figures.extrapolated(sum(theirs.bytes_exact for theirs in ranks)),
            collectives=group.traffic.collectives if group else 0,
            collectives_skipped=group.traffic.collectives_skipped if group else 0,
            count_exchanges=group.traffic.count_exchanges if group else 0,
            bytes_per_step=figures.bytes_per_step(),
            row_dtype="exact" if group is None else config.parallel.row_dtype,
        ),
        cache=CacheReport(config.cache.policy, statistics.bytes_peak, figures.per_layer(), figures.modules(), remark),
        seconds=Seconds.of([theirs.seconds for theirs in ranks], plan.num_steps),
        telemetry=merge([theirs.gpu for theirs in ranks], config.telemetry.period_s or 0.0, num_images),
        requests=describe_requests(requests),
    )

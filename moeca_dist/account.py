"""The account of a run: what every rank counted, brought together in one report."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.observation import Observation
from moeca_dist.parallel.references import RowCoding
from moeca_dist.report import CacheReport, ExchangeReport, Report, describe_requests
from moeca_dist.setup import Setup
from moeca_dist.telemetry import GpuRecord, merge
from moeca_dist.timing import Seconds, Section
from moeca_dist.types import Request

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What one run did on this rank."""

    observed: Observation
    started: float = field(default_factory=time.perf_counter)
    denoise_s: float = 0.0
    cache: CacheStatistics = field(default_factory=CacheStatistics)
    reference_bytes: int = 0

    def end_round(self, session: CacheSession | None, coding: RowCoding | None) -> None:
        """What is kept now is the most that the round keeps, or the session has seen it before."""
        if session is not None:
            session.note_peak()
        if coding is not None:
            self.reference_bytes = max(self.reference_bytes, coding.num_bytes)


@dataclass(frozen=True)
class _RankResult:
    """What one rank tells the others at the end of a run."""

    cache: CacheStatistics
    denoise_s: float
    seconds: dict[tuple[int, Section], float]
    bytes_sent: int
    bytes_exact: int
    gpu: GpuRecord | None
    reference_bytes: int


def account(setup: Setup, requests: Sequence[Request], counters: Counters) -> Report:
    """The report of a run, on every rank. A collective of the world."""
    num_images, config, mesh, group = len(requests), setup.config, setup.mesh, setup.mesh.expert_group
    mine = _RankResult(
        counters.cache,
        counters.denoise_s,
        counters.observed.seconds.per_step(),
        group.traffic.bytes_sent if group else 0,
        int(group.traffic.bytes_exact) if group else 0,
        counters.observed.gpu_record(),
        counters.reference_bytes,
    )
    ranks = mesh.world.gather_objects(mine) if mesh.world is not None else [mine]
    statistics = CacheStatistics()
    for theirs in ranks:
        statistics.merge(theirs.cache)
    work = setup.work(num_images, statistics)
    wall_s = time.perf_counter() - counters.started
    remark = None if setup.policy is None else setup.policy.remark(statistics)
    if remark is not None and mesh.rank == 0:
        logger.warning(remark)
    return Report(
        num_images=num_images,
        world_size=mesh.world_size,
        ep_size=mesh.ep_size,
        dp_size=mesh.dp_size,
        num_steps=setup.num_steps,
        wall_s=wall_s,
        denoise_s=max(theirs.denoise_s for theirs in ranks),
        images_per_s=num_images / wall_s,
        flops=work.flops(),
        branches=work.branches(),
        exchange=ExchangeReport(
            mode="exact" if group else "local",
            placement=setup.placement,
            bytes_sent=sum(theirs.bytes_sent for theirs in ranks),
            bytes_full=work.extrapolated(sum(theirs.bytes_exact for theirs in ranks)),
            collectives=group.traffic.collectives if group else 0,
            collectives_elided=group.traffic.collectives_elided if group else 0,
            agreements=group.traffic.agreements if group else 0,
            bytes_per_step=work.bytes_per_step(),
            rows="exact" if group is None else config.parallel.rows,
            reference_bytes=sum(theirs.reference_bytes for theirs in ranks),
        ),
        cache=CacheReport(config.cache.policy, statistics.bytes_peak, work.per_layer(), work.modules(), remark),
        seconds=Seconds.of([theirs.seconds for theirs in ranks], setup.num_steps),
        telemetry=merge([theirs.gpu for theirs in ranks], config.telemetry.period_s or 0.0, num_images),
        requests=describe_requests(requests),
    )

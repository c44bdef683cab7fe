"""Figures for Ray's dashboard and its Prometheus endpoint. Their names start with ``ray_moeca_`` there."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from ray.util.metrics import Counter, Gauge

from moeca_dist.telemetry.gpu import GpuMonitor, TelemetryUnavailableError

logger = logging.getLogger(__name__)


class JobMetrics:
    """The supervisor's figures of the whole job."""

    def __init__(self) -> None:
        self._images = Counter("moeca_images", "Images that are durable and recorded.")
        self._retries = Counter("moeca_chunk_retries", "Chunks given out again after a failed try.")
        self._quarantined = Counter("moeca_chunks_quarantined", "Chunks given up after too many failed tries.")

    def count_images(self, count: int) -> None:
        self._images.inc(count)

    def count_failure(self, quarantined: bool) -> None:
        (self._quarantined if quarantined else self._retries).inc()


class RankMetrics:
    """Figures of one rank: exchange and cache of its gang (on rank 0), memory and power of its GPU."""

    def __init__(self, gang: int, rank: int, device: torch.device) -> None:
        tags = {"gang": str(gang), "rank": str(rank)}
        self._tags = tags
        keys = tuple(tags)
        self._bytes_sent = Counter("moeca_bytes_sent", "Bytes of the expert all-to-all, whole gang.", keys)
        self._bytes_saved = Counter("moeca_bytes_saved", "Bytes the exact path would have sent besides.", keys)
        self._reuse_ratio = Gauge("moeca_reuse_ratio", "Share of branches not computed in the last chunk.", keys)
        self._gpu_gauges = {
            "memory_bytes": Gauge("moeca_gpu_memory_bytes", "Memory in use on the rank's GPU (NVML).", keys),
            "power_w": Gauge("moeca_gpu_power_watts", "Power draw of the rank's GPU (NVML).", keys),
        }
        self._gpu = _open(device)

    def note_chunk(self, report: Mapping[str, Any]) -> None:
        """Count a finished chunk from its report."""
        exchange = report["exchange"]
        sent, full = exchange["bytes_sent"], exchange["bytes_full"]
        # Counters refuse zero.
        if sent:
            self._bytes_sent.inc(sent, self._tags)
        if full > sent:
            self._bytes_saved.inc(full - sent, self._tags)
        self._reuse_ratio.set(report["branches"]["reuse_ratio"], self._tags)

    def note_gpu(self) -> None:
        """Read memory and power of the GPU if there is a driver."""
        if self._gpu is None:
            return
        try:
            found = self._gpu.read(tuple(self._gpu_gauges))
        except self._gpu.nvml.NVMLError as error:
            logger.warning("no more figures of the GPU: %s", error)
            self._gpu = None
            return
        for figure, value in found.items():
            self._gpu_gauges[figure].set(value, self._tags)


def _open(device: torch.device) -> GpuMonitor | None:
    if device.type != "cuda":
        return None
    try:
        return GpuMonitor.open(device)
    except TelemetryUnavailableError as error:
        logger.warning("no figures of the GPU: %s", error)
        return None

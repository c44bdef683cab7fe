"""The observation of a run: a timer of its sections and, if configured, a profiler and a sampler of the GPU."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import torch

from moeca_dist.config import TelemetryConfig
from moeca_dist.errors import UserError
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.telemetry.gpu import GpuMonitor, GpuRecord, GpuSampler, TelemetryUnavailableError
from moeca_dist.telemetry.profiler import TracedTimer, Tracer
from moeca_dist.timing import SectionTimer, Timer

logger = logging.getLogger(__name__)

TraceSink = Callable[[int, bytes], None]


def open_gpu_monitor(config: TelemetryConfig, mesh: Mesh) -> GpuMonitor | None:
    """Open this rank's GPU if telemetry is configured, else return None.

    If there is no GPU to watch, rank 0 logs the reason, and the run goes on.
    """
    if config.period_s is None:
        return None
    try:
        return GpuMonitor.open(mesh.device)
    except TelemetryUnavailableError as error:
        if mesh.rank == 0:
            logger.warning("telemetry.period_s is set, but there is no GPU to watch: %s", error)
        return None


class RunObserver(AbstractContextManager["RunObserver"]):
    """The observation of this rank while the context is open. ``timer`` measures the sections of the run."""

    def __init__(
        self, config: TelemetryConfig, gpu: GpuMonitor | None, mesh: Mesh, trace_sink: TraceSink | None
    ) -> None:
        """Raise UserError for ``telemetry.trace`` without a sink."""
        if config.trace is not None and trace_sink is None:
            raise UserError("telemetry.trace has no place for its traces here: unset it, or pass trace_sink")
        self._mesh = mesh
        self._trace_sink = trace_sink
        self._tracer = None if config.trace is None else Tracer(config.trace, mesh.device)
        self._sampler = None if gpu is None or config.period_s is None else GpuSampler(gpu, config.period_s)
        self._open = ExitStack()
        self.seconds = SectionTimer(mesh.device)
        self.timer: Timer = self.seconds if self._tracer is None else TracedTimer(self.seconds)

    def __enter__(self) -> "RunObserver":
        for observer in (self._tracer, self._sampler):
            if observer is not None:
                self._open.enter_context(observer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def end_step(self, index: int) -> None:
        """Record that denoising step ``index`` has ended."""
        self.seconds.end_step(index)
        if self._tracer is not None:
            self._tracer.end_step()

    def gpu_record(self) -> GpuRecord | None:
        """Return the GPU's record, or None without a sampler. Call it after the context was left."""
        return None if self._sampler is None else self._sampler.record()

    def deliver_trace(self) -> None:
        """Send the traces of all ranks to the sink of rank 0. A collective of the world.

        Only rank 0 knows a place for them.
        """
        if self._tracer is None or self._trace_sink is None:
            return
        trace, world = self._tracer.chrome_trace(), self._mesh.world
        if world is None:
            self._trace_sink(0, trace)
            return
        sizes = world.gather_objects(len(trace))
        block_N1 = torch.frombuffer(bytearray(trace), dtype=torch.uint8)[:, None]
        for rank, part in enumerate(world.gather_to_first(block_N1, sizes) or ()):
            self._trace_sink(rank, part.cpu().numpy().tobytes())

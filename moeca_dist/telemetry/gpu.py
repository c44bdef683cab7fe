"""GPU figures of a run, sampled through NVML: memory, utilisation, power, energy, throttling and traffic.

One thread per rank watches the rank's own device. A sample spends most of its time inside the driver, without the
interpreter's lock (a PCIe counter takes 20 ms). ``sampler_cpu_share`` reports the thread's CPU time.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean
from types import MappingProxyType, TracebackType
from typing import Any, Final, Protocol

import pynvml
import torch

MAX_POINTS: Final = 500  # of each curve in a report: more than a plot shows
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that slow a busy device: not idling, not clocks that were chosen.
THROTTLE_REASONS: Final = MappingProxyType(
    {
        "software power cap": 0x4,
        "hardware slowdown": 0x8,
        "sync boost": 0x10,
        "software thermal slowdown": 0x20,
        "hardware thermal slowdown": 0x40,
        "hardware power brake": 0x80,
    }
)
_ALL_LINKS: Final = 2**32 - 1


class Nvml(Protocol):
    """The functions of the module ``pynvml`` that are used here.

    Calls raise ``NVMLError`` for figures that a device or driver does not offer.
    """

    NVMLError: type[Exception]
    NVML_PCIE_UTIL_TX_BYTES: int
    NVML_PCIE_UTIL_RX_BYTES: int
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: int
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetPcieThroughput(self, handle: Any, counter: int, /) -> int: ...
    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[tuple[int, int]], /) -> Sequence[Any]: ...


class TelemetryUnavailableError(Exception):
    """The error that there is nothing to sample here. Its message gives the reason."""


@dataclass(frozen=True)
class GpuRecord:
    """The figures of one rank's device in a run.

    A figure that the device does not offer is None, or missing in ``series``.

    - ``energy_j``: energy of the whole device, including other processes.
    - ``throttled``: share of the samples by reason.
    - ``pcie_bytes``: extrapolated from windows of 20 ms.
    - ``nvlink_bytes``: counted.
    - ``series``: means over equal stretches of the run.
    """

    device: str
    uuid: str
    seconds: float
    num_samples: int
    sampler_cpu_share: float
    memory_bytes_peak: float | None
    utilisation_mean: float | None
    power_w_mean: float | None
    power_w_max: float | None
    energy_j: float | None
    throttled: dict[str, float] | None
    pcie_bytes: dict[str, float] | None
    nvlink_bytes: dict[str, float] | None
    series: dict[str, list[float]]
    ended_early: str | None


@dataclass(frozen=True)
class GpuMonitor:
    """A device that NVML knows, and the figures that the device offers."""

    nvml: Nvml
    handle: Any
    name: str
    uuid: str
    offered: tuple[str, ...]

    @classmethod
    def open(cls, device: torch.device, nvml: Nvml | None = None) -> "GpuMonitor":
        """Open ``device`` for reading.

        Raises TelemetryUnavailableError on a CPU, without a driver, or for a device that NVML does not know.
        """
        nvml = pynvml if nvml is None else nvml
        uuid = device_uuid(device)
        if uuid is None:
            raise TelemetryUnavailableError("this run computes on the CPU")
        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            name = nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError as error:
            raise TelemetryUnavailableError(f"NVML says: {error}") from None
        return cls(nvml, handle, name, uuid, tuple(figure for figure in _READERS if _offers(nvml, handle, figure)))

    def read(self, figures: Sequence[str] | None = None) -> dict[str, float]:
        """Return the current values of the offered figures, or of those among ``figures``.

        Raises ``NVMLError`` if the driver went away.
        """
        wanted = self.offered if figures is None else [figure for figure in self.offered if figure in figures]
        return {figure: float(_READERS[figure](self.nvml, self.handle)) for figure in wanted}

    def close(self) -> None:
        self.nvml.nvmlShutdown()


def device_uuid(device: torch.device) -> str | None:
    """Return NVML's name of a device, or None for a CPU.

    Indices would not do: CUDA_VISIBLE_DEVICES renumbers torch's indices but not NVML's.
    """
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


class GpuSampler(AbstractContextManager["GpuSampler"]):
    """A thread that samples ``gpu`` every ``period_s`` seconds while the context is open."""

    def __init__(self, gpu: GpuMonitor, period_s: float) -> None:
        self._gpu = gpu
        self._period_s = period_s
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._ended_early: str | None = None
        self._cpu_s = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="telemetry", daemon=True)

    def __enter__(self) -> "GpuSampler":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def record(self) -> GpuRecord:
        """Return the figures since the context was entered. Call it after the context was left."""
        times = [at for at, _ in self._samples]
        curves = {name: [sample[name] for _, sample in self._samples] for name in self._gpu.offered}
        seconds = times[-1] - times[0] if times else 0.0
        power = curves.get("power_w")
        energy = _increase(curves.get("energy_j"))
        reasons = curves.get("throttle_reasons")
        return GpuRecord(
            device=self._gpu.name,
            uuid=self._gpu.uuid,
            seconds=seconds,
            num_samples=len(times),
            sampler_cpu_share=self._cpu_s / seconds if seconds else 0.0,
            memory_bytes_peak=max(curves.get("memory_bytes") or (), default=None),
            utilisation_mean=_mean(curves.get("utilisation")),
            power_w_mean=_mean(power),
            power_w_max=max(power or (), default=None),
            # Devices without an energy counter: what their samples of power add up to.
            energy_j=energy if energy is not None or not power else mean(power) * seconds,
            throttled=_shares(reasons),
            pcie_bytes=_both({way: _mean(curves.get(f"pcie_{way}_bytes_per_s")) for way in _WAYS}, seconds),
            nvlink_bytes=_both({way: _increase(curves.get(f"nvlink_{way}_bytes")) for way in _WAYS}, 1.0),
            series=_series(times, curves),
            ended_early=self._ended_early,
        )

    def _watch(self) -> None:
        started = time.perf_counter()
        cpu_started = time.thread_time()
        due = started
        try:
            while True:
                # One last sample is taken after the end: counters must cover the whole run.
                last = self._done.wait(max(0.0, due - time.perf_counter()))
                self._samples.append((time.perf_counter() - started, self._gpu.read()))
                due = max(due + self._period_s, time.perf_counter())
                if last:
                    break
        except self._gpu.nvml.NVMLError as error:
            self._ended_early = str(error)
        self._cpu_s = time.thread_time() - cpu_started


def merge(records: Sequence[GpuRecord | None], period_s: float, num_images: int) -> dict[str, Any] | None:
    """Return the ``telemetry`` section of the report, or None if no rank has a record.

    Ranks that share a device report the same energy, which counts once.

    Args:
        records: the records of all ranks, in order of rank.
    """
    by_device = {record.uuid: record.energy_j for record in records if record is not None}
    if not by_device:
        return None
    known = [energy for energy in by_device.values() if energy is not None]
    energy = sum(known) if len(known) == len(by_device) else None
    return {
        "period_s": period_s,
        "energy_j": energy,
        "energy_j_per_image": None if energy is None else energy / num_images,
        "ranks": [None if record is None else asdict(record) for record in records],
    }


# ---- reading ---------------------------------------------------------------------------------------------------------

_WAYS: Final = ("sent", "received")


def _link_bytes(nvml: Nvml, handle: Any, field: int) -> float:
    (value,) = nvml.nvmlDeviceGetFieldValues(handle, [(field, _ALL_LINKS)])
    if value.nvmlReturn:
        raise nvml.NVMLError(value.nvmlReturn)
    return float(value.value.ullVal * 1024)


_Reader = Callable[[Nvml, Any], float]
# Counters come first, next to the sample's time, and what takes long to read last: rates are differences of both.
_READERS: Final[Mapping[str, _Reader]] = MappingProxyType(
    {
        "energy_j": lambda nvml, device: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000,
        "nvlink_sent_bytes": lambda nvml, device: _link_bytes(nvml, device, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
        "nvlink_received_bytes": lambda nvml, device: _link_bytes(
            nvml, device, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX
        ),
        "memory_bytes": lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device).used,
        "utilisation": lambda nvml, device: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
        "power_w": lambda nvml, device: nvml.nvmlDeviceGetPowerUsage(device) / 1000,
        "throttle_reasons": lambda nvml, device: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device),
        "pcie_sent_bytes_per_s": lambda nvml, device: (
            nvml.nvmlDeviceGetPcieThroughput(device, nvml.NVML_PCIE_UTIL_TX_BYTES) * 1000
        ),
        "pcie_received_bytes_per_s": lambda nvml, device: (
            nvml.nvmlDeviceGetPcieThroughput(device, nvml.NVML_PCIE_UTIL_RX_BYTES) * 1000
        ),
    }
)
_COUNTERS: Final = ("energy_j", "nvlink_sent_bytes", "nvlink_received_bytes")


def _offers(nvml: Nvml, handle: Any, figure: str) -> bool:
    try:
        _READERS[figure](nvml, handle)
    except nvml.NVMLError:
        return False
    return True


# ---- summing up ------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float] | None) -> float | None:
    return mean(values) if values else None


def _increase(counter: Sequence[float] | None) -> float | None:
    return counter[-1] - counter[0] if counter else None


def _both(ways: Mapping[str, float | None], factor: float) -> dict[str, float] | None:
    found = {way: value * factor for way, value in ways.items() if value is not None}
    return found if len(found) == len(_WAYS) else None


def _shares(reasons: Sequence[float] | None) -> dict[str, float] | None:
    if not reasons:
        return None
    counts = {name: sum(1 for bits in reasons if int(bits) & bit) for name, bit in THROTTLE_REASONS.items()}
    return {name: count / len(reasons) for name, count in counts.items() if count}


def _series(times: Sequence[float], curves: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Gauges as they are and traffic counters as rates, thinned to means of neighbours."""
    shown = {name: list(values) for name, values in curves.items() if name not in (*_COUNTERS, "throttle_reasons")}
    for name in _COUNTERS[1:]:
        if name in curves:
            steps = zip(pairwise(times), pairwise(curves[name]), strict=True)
            rates = [(after - before) / max(end - start, 1e-9) for (start, end), (before, after) in steps]
            shown[f"{name}_per_s"] = rates[:1] + rates  # one rate per sample: the first has none of its own
    width = max(1, -(-len(times) // MAX_POINTS))
    return {
        name: [mean(values[start : start + width]) for start in range(0, len(values), width)]
        for name, values in {"time_s": list(times), **shown}.items()
    }

"""A stand-in for the module ``pynvml`` with one device: counters that grow with time, figures that can be missing."""

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

UUID = "GPU-12345678-abcd"


class NVMLError(Exception):
    pass


class FakeNvml:
    """``missing``: names of functions, or field ids, that the device does not offer. ``fails_after``: samples."""

    NVMLError = NVMLError
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139

    def __init__(self, missing: Sequence[str | int] = (), fails_after: int | None = None, driver: bool = True) -> None:
        self.missing, self.fails_after, self.driver = set(missing), fails_after, driver
        self.is_open = False
        self.samples = 0
        self.started = time.perf_counter()

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("NVML Shared Library Not Found")
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA Fake"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._check("nvmlDeviceGetMemoryInfo", handle)
        self.samples += 1
        if self.fails_after is not None and self.samples > self.fails_after:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=self.samples * 2**20)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._check("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._check("nvmlDeviceGetPowerUsage", handle)
        return 300_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        """300 W since whenever, in mJ."""
        self._check("nvmlDeviceGetTotalEnergyConsumption", handle)
        return 10**9 + int(300_000 * (time.perf_counter() - self.started))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        """Chosen clocks always, the power cap in every other sample."""
        self._check("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return 0x2 | (0x4 if self.samples % 2 else 0)

    def nvmlDeviceGetPcieThroughput(self, handle: str, counter: int) -> int:
        """kB/s"""
        self._check("nvmlDeviceGetPcieThroughput", handle)
        return 1000 * (counter + 1)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: Sequence[tuple[int, int]]) -> list[Any]:
        """KiB since whenever, of all links: 1 GiB/s sent, 2 GiB/s received."""
        ((field, scope),) = fields
        assert scope == 2**32 - 1
        if field in self.missing:
            return [SimpleNamespace(nvmlReturn=3, value=None)]
        moved = int(2**20 * (field - 137) * (time.perf_counter() - self.started))
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=moved))]

    def _check(self, name: str, handle: str) -> None:
        assert handle == "handle" and self.is_open
        if name in self.missing:
            raise NVMLError("Not Supported")

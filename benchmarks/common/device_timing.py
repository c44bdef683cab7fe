"""Time on a device, and what the device can do: measured copy bandwidth and matrix-product rate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

WARM_UP = 3


def median_seconds(run: Callable[[Any], object], inputs: Sequence[Any], repeats: int, device: torch.device) -> float:
    """Median of ``repeats`` calls that take the input sets in turn, so that none finds its data in a cache.

    On CUDA between events of the current stream, on CPU by the clock.
    """
    for index in range(max(WARM_UP, len(inputs))):
        run(inputs[index % len(inputs)])
    if device.type == "cpu":
        seconds = []
        for index in range(repeats):
            started = perf_counter()
            run(inputs[index % len(inputs)])
            seconds.append(perf_counter() - started)
        return median(seconds)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for index, (start, end) in enumerate(marks):
        start.record()
        run(inputs[index % len(inputs)])
        end.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) / 1000 for start, end in marks)


@dataclass(frozen=True)
class Roofline:
    """Measured: bytes per second of a copy (read and written), FLOP per second of a square matrix product."""

    copy_bytes_per_s: float
    gemm_flop_per_s: float

    def floor_seconds(self, num_bytes: float, flop: float) -> float:
        """No faster than memory, and no faster than the multipliers."""
        return max(num_bytes / self.copy_bytes_per_s, flop / self.gemm_flop_per_s)


def measure_roofline(device: torch.device, dtype: torch.dtype, *, quick: bool) -> Roofline:
    elements, side = (2**20, 256) if quick else (2**29, 8192)
    pairs = [(torch.rand(elements, device=device).to(dtype), torch.empty(elements, device=device, dtype=dtype))]
    copied = median_seconds(lambda pair: pair[1].copy_(pair[0]), pairs, 10, device)
    squares = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
    multiplied = median_seconds(lambda square: square @ squares[0], squares, 10, device)
    return Roofline(2 * elements * dtype.itemsize / copied, 2 * side**3 / multiplied)

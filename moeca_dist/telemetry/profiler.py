"""A torch.profiler trace of the first denoising steps, with a named range for every section of the timer."""

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moeca_dist.timing import Section, Timer

PREFIX: Final = "moeca "
# The name that a reader of the trace looks for.
_RENAMED: Final[dict[Section, str]] = {"bookkeeping": "cache"}


class TracedTimer:
    """A timer whose sections are ranges of the trace too: ``moeca exchange``, ``moeca experts``, ``moeca cache`` ..."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer

    def section(self, name: Section) -> AbstractContextManager[Any]:
        return _Range(self._timer.section(name), PREFIX + _RENAMED.get(name, name))


class _Range(AbstractContextManager[None]):
    def __init__(self, section: AbstractContextManager[Any], name: str) -> None:
        self._section, self._range = section, record_function(name)

    def __enter__(self) -> None:
        self._range.__enter__()
        self._section.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._section.__exit__(kind, error, trace)
        self._range.__exit__(kind, error, trace)


class Tracer(AbstractContextManager["Tracer"]):
    """A profiler of this rank, from entering the context until ``num_steps`` denoising steps have ended."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities)
        self._steps_left = num_steps

    def __enter__(self) -> "Tracer":
        self._profile.start()
        return self

    def end_step(self) -> None:
        self._steps_left -= 1
        if self._steps_left == 0:
            self._profile.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The run had fewer steps, or failed: a profiler that still ran would spoil the next one of this process.
        if self._steps_left > 0:
            self._profile.stop()

    def chrome_trace(self) -> bytes:
        """Return the trace as gzipped JSON in Chrome's format, which Perfetto and chrome://tracing open."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            self._profile.export_chrome_trace(str(path))
            return path.read_bytes()

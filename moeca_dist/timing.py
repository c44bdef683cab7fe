"""Seconds of a run by section, measured without making the host wait for the device."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Literal, Protocol

import torch

Section = Literal["attention", "dense", "experts", "exchange", "wait", "bookkeeping", "graph", "other"]

SECTIONS: Final[tuple[Section, ...]] = (
    "attention",
    "dense",  # feed-forwards without experts
    "experts",  # router, routed and shared experts, bringing their rows into order, summing them up
    "exchange",  # payload collectives: starting them, and waiting for what nothing else hides
    "wait",  # gathering counts, where a rank waits for the slower ones
    "bookkeeping",  # what a cache costs: matching, decisions, forecasts, storing
    "graph",  # replayed CUDA graphs, which cannot be divided
    "other",  # modulation, embeddings, output layer, solver
)


class Timer(Protocol):
    """The interface with which the network is measured. A run passes its timer down as an argument."""

    def section(self, name: Section) -> AbstractContextManager[Any]:
        """Return a context whose time counts for ``name``, except for the time of inner sections."""
        ...


class Untimed:
    """A timer that measures nothing."""

    def section(self, name: Section) -> AbstractContextManager[Any]:
        return _NOTHING


_NOTHING: Final = nullcontext()
UNTIMED: Final = Untimed()


class SectionTimer:
    """Exclusive seconds of each section and denoising step on this rank.

    Sections nest and never overlap, so their seconds add up to the time that the outermost ones were open. On CUDA
    their bounds are events on the current stream, which are read after they have passed. So the seconds are those of
    the device, and measuring never makes the host wait.
    """

    def __init__(self, device: torch.device | str) -> None:
        device = torch.device(device)
        self._clock: _Clock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        self._open: list[Section] = []
        # (stamp, the section that was open until then), in order.
        self._marks: list[tuple[Any, Section | None]] = []
        self._unread: deque[tuple[int, list[tuple[Any, Section | None]]]] = deque()
        self._seconds: defaultdict[tuple[int, Section], float] = defaultdict(float)

    def section(self, name: Section) -> AbstractContextManager[None]:
        return _Opened(self, name)

    def end_step(self, index: int) -> None:
        """Charge denoising step ``index`` with everything since the last call."""
        self._mark()
        self._unread.append((index, self._marks))
        self._marks = self._marks[-1:]
        while self._unread and self._clock.has_passed(self._unread[0][1][-1][0]):
            self._read()

    def per_step(self) -> dict[tuple[int, Section], float]:
        """Return the seconds by (step, section) until the last ended step. The device must have finished."""
        while self._unread:
            self._read()
        return dict(self._seconds)

    def enter(self, name: Section) -> None:
        self._mark()
        self._open.append(name)

    def leave(self) -> None:
        self._mark()
        self._open.pop()

    def _mark(self) -> None:
        self._marks.append((self._clock.stamp(), self._open[-1] if self._open else None))

    def _read(self) -> None:
        """Add up the oldest step; its last stamp is the first of the next one."""
        index, marks = self._unread.popleft()
        for (start, _), (end, section) in pairwise(marks):
            if section is not None:
                self._seconds[index, section] += self._clock.seconds(start, end)
        self._clock.recycle([stamp for stamp, _ in marks[:-1]])


class _Opened(AbstractContextManager[None]):
    # A class of its own: a generator would take several times as long, hundreds of times in every step.
    __slots__ = ("_name", "_timer")

    def __init__(self, timer: SectionTimer, name: Section) -> None:
        self._timer, self._name = timer, name

    def __enter__(self) -> None:
        self._timer.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.leave()


# ---- clocks ----------------------------------------------------------------------------------------------------------


class _Clock(Protocol):
    def stamp(self) -> Any: ...

    def has_passed(self, stamp: Any) -> bool: ...

    def seconds(self, start: Any, end: Any) -> float: ...

    def recycle(self, stamps: Sequence[Any]) -> None:
        """Take back stamps that nobody reads any more."""
        ...


class _HostClock:
    def stamp(self) -> float:
        return perf_counter()

    def has_passed(self, stamp: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def recycle(self, stamps: Sequence[float]) -> None:
        pass


class _DeviceClock:
    """Stamps are events of one device; used ones are recorded again, because making them is slow."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Event] = []

    def stamp(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, stamp: torch.cuda.Event) -> bool:
        return bool(stamp.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        # NOTE: waits where the end has not passed; asked only after it has, or at the end of the run.
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def recycle(self, stamps: Sequence[torch.cuda.Event]) -> None:
        self._free += stamps


# ---- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Seconds of denoising by section: ``slowest`` of the rank that took longest, ``mean`` of all ranks.

    ``per_step`` divides ``slowest`` by denoising step. Sections that took no time on any rank are left out.
    """

    slowest: dict[str, float]
    mean: dict[str, float]
    per_step: dict[str, list[float]]

    @classmethod
    def of(cls, ranks: Sequence[Mapping[tuple[int, Section], float]], num_steps: int) -> "Seconds":
        """Summarize the results of ``SectionTimer.per_step`` of all ranks."""
        totals = [{name: sum(s for (_, n), s in rank.items() if n == name) for name in SECTIONS} for rank in ranks]
        slowest = max(range(len(ranks)), key=lambda rank: sum(totals[rank].values()))
        shown = [name for name in SECTIONS if any(total[name] for total in totals)]
        return cls(
            {name: totals[slowest][name] for name in shown},
            {name: sum(total[name] for total in totals) / len(ranks) for name in shown},
            {name: [ranks[slowest].get((step, name), 0.0) for step in range(num_steps)] for name in shown},
        )

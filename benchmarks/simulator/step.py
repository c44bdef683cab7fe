"""The step simulator: phases of work that every rank goes through, and the exchanges between them.

A MoE layer of a step is: work at home (attention, router, cache, shared expert), an agreement on row counts, the rows'
way to the owners of their experts, part of which the shared expert hides, the experts, the way back. After every
collective all ranks go on together, so each phase takes as long as its slowest rank. What work and links take is the
machine's affair: see ``cpu.py`` and ``gpu.py``.

Shape suffixes: P ranks, O owners among them, L MoE layers, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeca_dist.moe.value_location import Location
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.tuning.experts.assign import homes
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.tuning.experts.traffic import LayerTraffic, Returns, RowBytes, layer_traffic


class Machine(Protocol):
    """What a machine makes of one step's work; seconds throughout."""

    def home_P(self, step: int) -> NDArray[np.float64]:
        """Work of a step outside the routed experts, of each rank."""
        ...

    def experts_P(self, rows_PE: NDArray[np.int64]) -> NDArray[np.float64]:
        """Work of one layer's routed experts at each rank."""
        ...

    def shared_P(self, full: bool) -> NDArray[np.float64]:
        """Of the work at home in one layer, the shared expert's: each rank computes it while hidden rows travel."""
        ...

    def stretch(self, traffic: LayerTraffic) -> float:
        """How many times as long a layer's work takes because its rows travel in between."""
        ...

    def together(self, work_P: NDArray[np.float64]) -> float:
        """From a common start until the slowest rank has done its work."""
        ...

    def agree(self, numbers: int) -> float:
        """Every rank learns so many counts of every rank."""
        ...

    def send(self, sent_PO: NDArray[np.int64], owners_O: NDArray[np.int64], back: bool, meanwhile_s: float) -> float:
        """A payload collective, with what it takes to bring rows into order, into buffers and out of them.

        ``meanwhile_s``: work at home, counted there, that goes on while rows are under way.
        """
        ...

    def pass_time(self, seconds: float) -> None:
        """The links have been idle for so long."""
        ...


@dataclass
class StepTime:
    """Seconds of the slowest rank; ``wait``: what the others lack of its work, ranks' mean."""

    home: float = 0.0
    experts: float = 0.0
    exchange: float = 0.0
    agree: float = 0.0
    wait: float = 0.0

    @property
    def total(self) -> float:
        """Waiting is inside the phases of the slowest rank."""
        return self.home + self.experts + self.exchange + self.agree

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "StepTime":
        return StepTime(*(getattr(self, f.name) * times for f in fields(self)))


def traffic_of_steps(
    trace: RoutingTrace,
    table: PlacementTable,
    num_ranks: int,
    location: Location,
    row: RowBytes | None = None,
) -> Iterator[list[LayerTraffic | None]]:
    """By step: the traffic of each MoE layer, None where no router ran. ``row`` None: rows travel as they are."""
    row = row or RowBytes.exact(trace.row_bytes)
    home_N = homes(trace, num_ranks)
    returns: Returns = "sums" if not trace.keeps_branches else "branches" if location == "home" else "owner"
    for step in range(trace.num_steps):
        found: list[LayerTraffic | None] = []
        for place, block in enumerate(trace.blocks):
            ids_NK = trace.expert_ids_SLHBTK[step, place].reshape(-1, trace.num_experts_per_tok)
            fresh_NK = trace.refreshed_SLHBTK[step, place].reshape(ids_NK.shape)
            if not trace.keeps_branches and not fresh_NK.any():
                found.append(None)
            else:
                found.append(layer_traffic(ids_NK, fresh_NK, home_N, table.by_block[block], row, returns))
        yield found


def simulate_step(
    step: int,
    layers: Sequence[LayerTraffic | None],
    machine: Machine,
    full: bool = True,
) -> StepTime:
    """One step; ``full``: everything is computed."""
    home_P = machine.home_P(step)
    num_ranks, time = len(home_P), StepTime()
    for traffic in layers:
        stretch = 1.0 if traffic is None or num_ranks == 1 else machine.stretch(traffic)
        _phase(time, "home", home_P / len(layers) * stretch, machine)
        if traffic is None:
            continue
        if num_ranks > 1:
            time.agree += machine.agree(2 * num_ranks)
        if not traffic.rows_PE.any():
            continue
        if num_ranks > 1:
            meanwhile = machine.together(machine.shared_P(full))
            time.exchange += machine.send(traffic.there_PO, traffic.owners_O, back=False, meanwhile_s=meanwhile)
        _phase(time, "experts", machine.experts_P(traffic.rows_PE) * stretch, machine)
        if num_ranks > 1:
            time.exchange += machine.send(traffic.back_PO, traffic.owners_O, back=True, meanwhile_s=0.0)
    return time


def _phase(time: StepTime, name: str, work_P: NDArray[np.float64], machine: Machine) -> None:
    seconds = machine.together(work_P)
    setattr(time, name, getattr(time, name) + seconds)
    time.wait += seconds - float(work_P.mean()) if len(work_P) > 1 else 0.0
    machine.pass_time(seconds)

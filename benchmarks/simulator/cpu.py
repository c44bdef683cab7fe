"""Ranks that are CPU processes of one machine: what their work and exchanges take, from a table of measurements.

``measure.py`` makes the table.

Shape suffixes: P ranks, O owners, E experts.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.netns import FRAME_HEADER_BYTES, Link
from benchmarks.scaling.rank_cases import CODED, ON_ONE_RANK
from benchmarks.simulator.links import LimitedLinks
from benchmarks.simulator.step import traffic_of_steps
from moeca_dist.errors import UserError
from moeca_dist.parallel.expert_placement import ExpertPlacement, PlacementTable
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.tuning.experts.traffic import LayerTraffic

OWN_SECTIONS = ("attention", "dense", "experts", "bookkeeping", "other")
# IP and TCP headers with timestamps, of every full frame.
PACKET_HEADER_BYTES = 52


@dataclass(frozen=True)
class Experts:
    """Seconds of the routed experts of a layer, by rows of each: piecewise linear between the measured row counts."""

    least_s: float
    rows: NDArray[np.float64]
    seconds: NDArray[np.float64]

    @classmethod
    def of(cls, micro: Mapping[str, Any]) -> "Experts":
        pairs = sorted((int(rows), seconds) for rows, seconds in micro["experts"]["per_expert_s"].items())
        rows, seconds = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
        return cls(micro["experts"]["least_s"], np.r_[0.0, rows], np.r_[0.0, seconds])

    def of_PE(self, rows_PE: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds_PE = np.interp(rows_PE, self.rows, self.seconds)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return seconds_PE + np.maximum(rows_PE - self.rows[-1], 0) * slope


@dataclass(frozen=True)
class Exchanges:
    """Seconds of an exchange between ranks that come at the same moment, without what a limited link adds."""

    agree_s: float
    leg_bytes: NDArray[np.float64]
    leg_s: NDArray[np.float64]
    stretches: NDArray[np.float64]

    @classmethod
    def of(cls, measured: Mapping[str, Any], coded: bool) -> "Exchanges":
        cells = measured["coded" if coded else "exact"]
        rows = sorted((cell["bytes"], cell["seconds"], cell["stretch"]) for cell in cells)
        both_bytes, both_s, stretches = (np.array(column, np.float64) for column in zip(*rows, strict=True))
        return cls(measured["agree_s"], both_bytes / 2, both_s / 2, stretches)

    def stretch(self, most_bytes: float) -> float:
        """How many times as long work takes beside an exchange in which the busiest rank sends so many bytes a leg."""
        return float(np.interp(most_bytes, self.leg_bytes, self.stretches))

    def leg(self, most_bytes: float) -> float:
        """One leg in which the busiest rank sends so many bytes."""
        slope = (self.leg_s[-1] - self.leg_s[-2]) / (self.leg_bytes[-1] - self.leg_bytes[-2])
        beyond = max(0.0, most_bytes - float(self.leg_bytes[-1]))
        return float(np.interp(most_bytes, self.leg_bytes, self.leg_s)) + beyond * max(0.0, float(slope))


class CpuMachine:
    """``num_ranks`` processes that share ``cores``, joined by loopback or by limited links.

    ``probe_mbit``: what one TCP flow got over such a link; None takes the headers off its rate.
    """

    def __init__(
        self,
        table: Mapping[str, Any],
        policy: str,
        trace: RoutingTrace,
        num_ranks: int,
        cores: float,
        link: Link | None = None,
        probe_mbit: float | None = None,
    ) -> None:
        """Raises UserError where the table lacks the number of ranks, a rank's number of images, or links."""
        self._num_ranks, self._cores = num_ranks, cores
        compute, micro = table["compute"][ON_ONE_RANK.get(policy, policy)], table["micro"]
        if str(num_ranks) not in compute:
            raise UserError(f"the table holds no measurement of {num_ranks} rank(s): measure with --ranks {num_ranks}")
        # One rank alone has the experts' times of some group.
        measured = micro[str(num_ranks) if num_ranks > 1 else min(micro)]
        self._experts = Experts.of(measured)
        self._home_SP = self._home(compute[str(num_ranks)], trace)
        _, _, halves, _, positions, _ = trace.expert_ids_SLHBTK.shape
        self._shared_P = np.array(self._shares(trace.num_images)) * halves * positions * measured["shared_s_per_token"]
        kind = "loopback" if link is None else "links"
        if kind not in measured["exchange"]:
            raise UserError("the table holds no measurement of virtual links: measure with sudo, which can make them")
        self._exchanges = Exchanges.of(measured["exchange"][kind], policy in CODED)
        self._links = None
        if link is not None:
            payload = (link.mtu - PACKET_HEADER_BYTES) / (link.mtu + FRAME_HEADER_BYTES)
            goodput = probe_mbit or link.rate_mbit * payload
            self._links = LimitedLinks(num_ranks, goodput * 1e6 / 8, link.burst_kb * 1024)

    def home_P(self, step: int) -> NDArray[np.float64]:
        return self._home_SP[step]

    def experts_P(self, rows_PE: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds_P = self._experts.of_PE(rows_PE).sum(1)
        return np.where(rows_PE.any(1), np.maximum(seconds_P, self._experts.least_s), 0.0)

    def shared_P(self, full: bool) -> NDArray[np.float64]:
        return self._shared_P if full else np.zeros(self._num_ranks)

    def stretch(self, traffic: LayerTraffic) -> float:
        sent_PO, back_PO = traffic.there_PO, traffic.back_PO
        return self._exchanges.stretch(float(max(sent_PO.sum(1).max(), back_PO.sum(1).max())))

    def together(self, work_P: NDArray[np.float64]) -> float:
        return float(max(work_P.max(), work_P.sum() / self._cores))

    def agree(self, numbers: int) -> float:
        self.pass_time(self._exchanges.agree_s)
        return self._exchanges.agree_s

    def send(self, sent_PO: NDArray[np.int64], owners_O: NDArray[np.int64], back: bool, meanwhile_s: float) -> float:
        out_P, in_P = sent_PO.sum(1), np.zeros(self._num_ranks)
        np.add.at(in_P, owners_O, sent_PO.sum(0))
        started = self._exchanges.leg(float(max(out_P.max(), in_P.max())))
        if self._links is None:
            return started  # the kernel's copies need the cores themselves: nothing is hidden
        self.pass_time(started)
        under_way = self._links.transfer_s(*((in_P, out_P) if back else (out_P, in_P)))
        return started + max(0.0, under_way - meanwhile_s)

    def pass_time(self, seconds: float) -> None:
        if self._links is not None:
            self._links.wait(seconds)

    def _home(self, measured: Mapping[str, Any], trace: RoutingTrace) -> NDArray[np.float64]:
        """[S, P]: everything a rank did on its own, less its routed experts, which move to their owners."""
        shares = self._shares(trace.num_images)
        by_count = {share: self._without_experts(measured, trace, share) for share in set(shares)}
        return np.stack([by_count[share] for share in shares], 1)

    def _shares(self, images: int) -> list[int]:
        """Images of each rank."""
        starts = [rank * images // self._num_ranks for rank in range(self._num_ranks + 1)]
        return [end - start for start, end in pairwise(starts)]

    def _without_experts(self, measured: Mapping[str, Any], trace: RoutingTrace, images: int) -> NDArray[np.float64]:
        if not images:
            return np.zeros(trace.num_steps)
        if str(images) not in measured:
            raise UserError(f"the table holds no measurement of {images} image(s) per rank: measure with these ranks")
        sections = measured[str(images)]
        found_S = np.sum([sections[name] for name in OWN_SECTIONS if name in sections], 0)
        table = PlacementTable.same(ExpertPlacement((0,) * trace.num_experts, 1), trace.blocks)
        for step, layers in enumerate(traffic_of_steps(trace.first_images(images), table, 1, "home")):
            for traffic in layers:
                if traffic is not None:
                    found_S[step] -= self.experts_P(traffic.rows_PE)[0]
        return np.maximum(found_S, 0.0)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

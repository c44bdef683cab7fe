"""Ranks that are CPU processes of one machine, as a table of measurements: its making, and the machine it describes.

The table holds, for one configuration: seconds by section and step of single ranks that generate 1, 2, ... images (side
by side on two cores, as the ranks of a group work), the routed experts by rows, and what an exchange costs its ranks.
All of it is core-seconds (CPU time), so that other work on the machine disturbs it less than the clock.

Shape suffixes: P ranks, O owners, E experts.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from netns import Link
from numpy.typing import NDArray
from rank_cases import ON_ONE_RANK, chosen
from rank_job import Job
from rank_launch import environment, run_with_torchrun
from sim_step import traffic_of_steps

from moeca_dist.config import load_config
from moeca_dist.engine import Engine
from moeca_dist.errors import UserError
from moeca_dist.parallel.cost import LimitedLinks
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.placement_table import PlacementTable
from moeca_dist.parallel.routing_trace import RoutingTrace
from moeca_dist.parallel.traffic import LayerTraffic
from moeca_dist.record import record_routing
from moeca_dist.types import Request

MICRO = Path(__file__).with_name("sim_micro_job.py")
OWN_SECTIONS = ("attention", "dense", "experts", "bookkeeping", "other")
# Ethernet, IP and TCP headers with timestamps, of every full frame.
FRAME_BYTES, HEADER_BYTES = 1514, 66
SIDE_BY_SIDE = 2  # ranks at a time while measuring: as many as there are cores


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    path: Path, policies: Sequence[str], num_images: int, ranks: Sequence[int], repeats: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """The table for ``num_images`` images dealt to 1 and to each number of ``ranks``."""
    jobs = sorted({(1 if count == 1 else SIDE_BY_SIDE, -(-num_images // count)) for count in (1, *ranks)})
    jobs += sorted({(SIDE_BY_SIDE, num_images // count) for count in ranks} - set(jobs))
    compute: dict[str, dict[str, Any]] = {}
    for world, images in jobs:
        if images:
            records = _generate(path, policies, world, images, repeats, overrides)
            for policy in dict.fromkeys(record["cell"] for record in records):
                mine = [record for record in records if record["cell"] == policy]
                compute.setdefault(policy, {}).setdefault(str(world), {})[str(images)] = _by_step(mine, world)
    micro = {str(count): _micro(path, count, overrides) for count in sorted({*ranks, SIDE_BY_SIDE})}
    return {"num_images": num_images, "compute": compute, "micro": micro}


def _generate(
    path: Path, policies: Sequence[str], world: int, images: int, repeats: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    settings = ("model.device=cpu", f"sampling.batch_size={images}", "parallel.ep_size=1", *overrides)
    cells = chosen([name for name in policies if name not in ON_ONE_RANK], 1)
    job = Job(str(path), settings, cells, images * world, repeats, 3)
    return run_with_torchrun(job, world, "cpu", 3600).records


def _by_step(records: Sequence[Mapping[str, Any]], world: int) -> dict[str, list[float]]:
    """Core-seconds of each section and step of one rank: medians of the repeats."""
    found: dict[str, list[float]] = {}
    for name in OWN_SECTIONS:
        rows = []
        for record in records:
            share = sum(record["cpu_s_per_rank"]) / world / record["report"]["wall_s"]
            steps = record["report"]["seconds"]["per_step"].get(name)
            if steps is not None:
                rows.append([share * seconds for seconds in steps])
        if rows:
            found[name] = [median(column) for column in zip(*rows, strict=True)]
    return found


def _micro(path: Path, num_ranks: int, overrides: Sequence[str]) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    with tempfile.TemporaryDirectory(prefix="moeca-micro-") as folder:
        out = Path(folder) / "micro.json"
        argv = [*launcher, str(MICRO), str(path), str(out), *overrides]
        done = subprocess.run(argv, env=environment("cpu", "lo"), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"measuring the exchange failed: {(done.stderr.splitlines() or ['no word'])[-1]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def record(path: Path, policy: str, num_images: int, overrides: Sequence[str], seed: int = 0) -> RoutingTrace:
    """The trace of what ``network.py`` generates: its labels, and with seed 0 its noise."""
    config = load_config(path, ["model.device=cpu", f"sampling.batch_size={num_images}", *overrides])
    (cell,) = chosen([policy], 1)
    engine = Engine.from_config(config.model_copy(update={"cache": cell.section(config.cache)}), mesh=Mesh.single())
    classes = engine.model.spec.num_classes
    requests = [Request(index, index % classes, seed) for index in range(num_images)]
    trace = record_routing(engine, requests, f"{path.name}, {policy}")
    assert trace is not None
    return trace


# ---- the machine -----------------------------------------------------------------------------------------------------


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

    def of_E(self, rows_E: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds_E = np.interp(rows_E, self.rows, self.seconds)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return seconds_E + np.maximum(rows_E - self.rows[-1], 0) * slope


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
        self._num_ranks, self._cores = num_ranks, cores
        world = SIDE_BY_SIDE if num_ranks > 1 else 1
        self._micro = table["micro"].get(str(num_ranks), table["micro"][str(SIDE_BY_SIDE)])
        self._experts = Experts.of(self._micro)
        self._home_SP = self._home(table["compute"][ON_ONE_RANK.get(policy, policy)][str(world)], trace)
        if num_ranks > 1:
            cells = self._micro["exchange"]["cells"]
            sizes, seconds = ([cell[key] for cell in cells] for key in ("bytes", "core_s"))
            # What a layer's exchange costs a rank: once, and by byte; the least are noise around a constant.
            per_byte, fixed = np.polyfit(sizes, seconds, 1)
            self._per_byte, self._fixed = max(0.0, float(per_byte)), max(0.0, float(fixed))
            # What the smallest exchange takes by the clock beyond its work: ranks that wake each other up.
            work = self.together(np.full(num_ranks, self._fixed)) + self._micro["exchange"]["agree_s"]
            self._wake_s = max(0.0, self._micro["exchange"]["layer_s"] - work)
        self._links = None
        if link is not None:
            goodput = probe_mbit or link.rate_mbit * (FRAME_BYTES - HEADER_BYTES) / FRAME_BYTES
            self._links = LimitedLinks(num_ranks, goodput * 1e6 / 8, link.burst_kb * 1024)

    def home_P(self, step: int) -> NDArray[np.float64]:
        return self._home_SP[step]

    def experts_P(self, rows_E: NDArray[np.int64], owner_E: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds_E = self._experts.of_E(rows_E)
        found_P = np.bincount(owner_E, seconds_E, minlength=self._num_ranks)
        busy_P = np.bincount(owner_E, rows_E, minlength=self._num_ranks) > 0
        return np.where(busy_P, np.maximum(found_P, self._experts.least_s), 0.0)

    def handling_P(self, traffic: LayerTraffic) -> NDArray[np.float64]:
        sent_P = traffic.there_PO.sum(1)
        np.add.at(sent_P, traffic.owners_O, traffic.back_PO.sum(0))
        return self._fixed + self._per_byte * sent_P

    def together(self, work_P: NDArray[np.float64]) -> float:
        return float(max(work_P.max(), work_P.sum() / self._cores))

    def agree(self, numbers: int) -> float:
        exchange = self._micro["exchange"]
        seconds: float = max(exchange["agree_s"], exchange["agree_core_s"] * self._num_ranks / self._cores)
        self.pass_time(seconds)
        return seconds

    def send(self, sent_PO: NDArray[np.int64], owners_O: NDArray[np.int64], back: bool) -> float:
        started = self._wake_s / 2  # there and back are one layer
        if self._links is None:
            return started  # what the kernel copies is in the handling
        self.pass_time(started)
        out_P, in_P = sent_PO.sum(1), np.zeros(self._num_ranks)
        np.add.at(in_P, owners_O, sent_PO.sum(0))
        return started + self._links.transfer_s(*((in_P, out_P) if back else (out_P, in_P)))

    def pass_time(self, seconds: float) -> None:
        if self._links is not None:
            self._links.wait(seconds)

    def _home(self, measured: Mapping[str, Any], trace: RoutingTrace) -> NDArray[np.float64]:
        """[S, P]: everything a rank did on its own, less its routed experts, which move to their owners."""
        images = trace.num_images
        shares = [(rank + 1) * images // self._num_ranks - rank * images // self._num_ranks
                  for rank in range(self._num_ranks)]  # fmt: skip
        by_count = {share: self._without_experts(measured, trace, share) for share in set(shares)}
        return np.stack([by_count[share] for share in shares], 1)

    def _without_experts(self, measured: Mapping[str, Any], trace: RoutingTrace, share: int) -> NDArray[np.float64]:
        if not share:
            return np.zeros(trace.num_steps)
        if str(share) not in measured:
            raise UserError(f"the table holds no measurement of {share} image(s) per rank: measure it with these ranks")
        sections = measured[str(share)]
        found_S = np.sum([sections[name] for name in OWN_SECTIONS if name in sections], 0)
        table = PlacementTable.same(ExpertPlacement((0,) * trace.num_experts, 1), trace.blocks)
        for step, layers in enumerate(traffic_of_steps(trace.first_images(share), table, 1, "home")):
            for traffic in layers:
                if traffic is not None and traffic.rows_E.any():
                    found_S[step] -= max(self._experts.of_E(traffic.rows_E).sum(), self._experts.least_s)
        return np.maximum(found_S, 0.0)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

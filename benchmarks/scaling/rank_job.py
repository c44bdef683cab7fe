"""One rank of a benchmark job: builds the network once and generates with every cell, round by round.

A launcher (torchrun, or ``network.py`` in its namespaces) starts it on all ranks with the path of a ``Job``. Rank 0
writes ``records.json`` and the samples of each cell's first round beside it. A cell's first run is a warm-up of few
steps; then every round runs all cells in an order drawn anew, so that a busy moment of the machine hits no cell alone.
"""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.hardware import busy_core_seconds
from benchmarks.common.machine_speed import FixedWork, reference_seconds
from benchmarks.common.unrounded import Unrounded
from moeca_dist.config import CacheConfig, load_config
from moeca_dist.errors import PeerLostError, UserError
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.engine import Engine, join
from moeca_dist.types import Request

STATISTICS = Path("/sys/class/net")
RECORDS = "records.json"


@dataclass(frozen=True)
class Cell:
    """One configuration of a job: its name, the ``cache:`` section that replaces that of the file, and keys of the
    ``parallel:`` section.

    A cell that names a policy and nothing else leaves the file's cache alone where that has tuned this policy.
    """

    name: str
    cache: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=dict)

    def section(self, of_file: CacheConfig) -> CacheConfig:
        return of_file if self.cache == {"policy": of_file.policy} else CacheConfig.model_validate(self.cache)


@dataclass(frozen=True)
class Job:
    """``config`` and ``overrides`` as in ``launch/generate.py``; the labels are the model's classes in turn."""

    config: str
    overrides: tuple[str, ...]
    cells: tuple[Cell, ...]
    num_images: int
    repeats: int
    warmup_steps: int
    seed: int = 0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        values = json.loads(path.read_text())
        cells = tuple(Cell(**cell) for cell in values.pop("cells"))
        return cls(**values | {"cells": cells, "overrides": tuple(values["overrides"])})


def main(path: str) -> int:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    job = Job.read(Path(path))
    try:
        run(job, Path(path).parent)
    except (UserError, PeerLostError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    return 0


def run(job: Job, folder: Path) -> None:
    config = load_config(job.config, job.overrides)
    mesh = join(config)
    model = Engine.from_config(config, mesh=mesh).model
    classes = model.spec.num_classes
    requests = [Request(index, index % classes, job.seed) for index in range(job.num_images)]
    for cell in job.cells:
        engine_of(cell, job, mesh, model, num_steps=job.warmup_steps).generate(requests)
    records = []
    order = random.Random(0)  # the same on all ranks
    work = FixedWork() if mesh.device.type == "cpu" else None
    for repeat in range(job.repeats):
        for cell in order.sample(job.cells, len(job.cells)):
            samples, record = measure_with_speed(engine_of(cell, job, mesh, model), requests, work)
            records.append({"cell": cell.name, "repeat": repeat} | record)
            if mesh.rank == 0 and repeat == 0:
                np.save(folder / f"{job.cells.index(cell)}.npy", samples)
    if mesh.rank == 0:
        (folder / RECORDS).write_text(json.dumps(records))
    mesh.close()


def engine_of(cell: Cell, job: Job, mesh: Mesh, model: DiffusionTransformer, num_steps: int | None = None) -> Engine:
    """``num_steps``: of a warm-up, to which a schedule that the file has tuned does not apply."""
    config = load_config(job.config, job.overrides)
    sections: dict[str, Any] = {"parallel": config.parallel.model_copy(update=cell.parallel)}
    if num_steps is None:
        sections["cache"] = cell.section(config.cache)
    else:
        sections["cache"] = CacheConfig.model_validate(cell.cache)
        sections["sampling"] = config.sampling.model_copy(update={"num_steps": num_steps})
    return Engine(config.model_copy(update=sections), mesh, model, Unrounded())


def measure_with_speed(
    engine: Engine, requests: Sequence[Request], work: FixedWork | None
) -> tuple[NDArray[np.generic], dict[str, Any]]:
    """``measure``; ``reference_s`` says how fast the machine was before and after it, where there is ``work``."""
    if work is None:
        return measure(engine, requests)
    before = reference_seconds(work, engine.mesh.world)
    samples, record = measure(engine, requests)
    return samples, record | {"reference_s": (before + reference_seconds(work, engine.mesh.world)) / 2}


def measure(engine: Engine, requests: Sequence[Request]) -> tuple[NDArray[np.generic], dict[str, Any]]:
    """One run; its record has the report and, of every rank, peak memory and the bytes that its interface sent."""
    mesh = engine.mesh
    forget_peak(mesh.device)
    if mesh.world is not None:
        mesh.world.barrier()
    sent, own_work, all_work, started = interface_bytes(), time.process_time(), busy_core_seconds(), time.perf_counter()
    samples, report = engine.generate(requests)
    seconds = time.perf_counter() - started
    all_work = busy_core_seconds() - all_work
    mine = (peak_bytes(mesh.device), interface_bytes() - sent, time.process_time() - own_work)
    ranks = mesh.world.gather_objects(mine) if mesh.world is not None else [mine]
    return samples, {
        "report": json.loads(report.to_json()),
        "batch_size": engine.config.sampling.batch_size,
        "peak_bytes_per_rank": [peak for peak, *_ in ranks],
        "interface_bytes": sum(sent for _, sent, _ in ranks),
        "cpu_s_per_rank": [work for *_, work in ranks],
        # What the kernel did for these ranks' traffic outside of their system calls counts as others' work too.
        "cores_used_by_others": max(0.0, all_work - sum(work for *_, work in ranks)) / seconds,
    }


# ---- memory and traffic of this process ------------------------------------------------------------------------------


def forget_peak(device: torch.device) -> None:
    """Start the peak anew, where the kernel lets a process do so: a cell must not be charged with its predecessor."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory held since ``forget_peak``: of the device, or resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        facts = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(facts["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interface_bytes() -> int:
    """Bytes that this rank's own network interface has sent, headers and acknowledgements among them.

    0 on loopback, which everybody on the machine shares.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    counter = STATISTICS / interface / "statistics" / "tx_bytes"
    return int(counter.read_text()) if interface != "lo" and counter.is_file() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

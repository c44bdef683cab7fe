"""The table of ranks that are CPU processes of this machine, from which ``cpu.py`` predicts.

It holds, for one configuration and each number of ranks: seconds by section and step of so many single ranks that
generate side by side, the routed experts by rows, and what an exchange takes, over loopback and over unlimited virtual
links. What computes is in core-seconds (CPU time), so that other work on the machine disturbs it less than the clock;
and all of it at one speed of the machine, by a reference work done before and after (``machine_speed.py``).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.machine_speed import times
from benchmarks.scaling.netns import Network, require
from benchmarks.scaling.rank_cases import ON_ONE_RANK, chosen
from benchmarks.scaling.rank_job import Job
from benchmarks.scaling.rank_launch import finish, run_with_torchrun, start_in_network, start_with_torchrun
from benchmarks.simulator.cpu import OWN_SECTIONS
from moeca_dist.config import load_config
from moeca_dist.errors import UserError
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.engine import Engine
from moeca_dist.tuning.experts.record import record_routing
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.types import Request

MICRO = "benchmarks.simulator.micro_job"
TIMEOUT_S = 3600


def measure(
    path: Path, policies: Sequence[str], num_images: int, ranks: Sequence[int], repeats: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """The table for ``num_images`` images dealt to 1 and to each number of ``ranks``."""
    counts = sorted({1, *ranks})
    jobs = sorted({(count, images) for count in counts for images in shares_to_measure(num_images, count)})
    compute: dict[str, dict[str, Any]] = {}
    launches = {job: _generate(path, policies, *job, repeats, overrides) for job in jobs}
    reference_s = median(record["reference_s"] for records in launches.values() for record in records)
    for (world, images), records in launches.items():
        for policy in dict.fromkeys(record["cell"] for record in records):
            mine = [record for record in records if record["cell"] == policy]
            compute.setdefault(policy, {}).setdefault(str(world), {})[str(images)] = _by_step(mine, world, reference_s)
    micro = {str(count): _micro(path, count, overrides, reference_s) for count in counts if count > 1}
    return {"num_images": num_images, "reference_s": reference_s, "compute": compute, "micro": micro}


def shares_to_measure(num_images: int, num_ranks: int) -> set[int]:
    """How many images one rank has."""
    return {share for share in (num_images // num_ranks, -(-num_images // num_ranks)) if share}


def _generate(
    path: Path, policies: Sequence[str], world: int, images: int, repeats: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    settings = ("model.device=cpu", f"sampling.batch_size={images}", "parallel.ep_size=1", *overrides)
    cells = chosen([name for name in policies if name not in ON_ONE_RANK], 1)
    job = Job(str(path), settings, cells, images * world, repeats, 3)
    return run_with_torchrun(job, world, "cpu", TIMEOUT_S).records


def _by_step(records: Sequence[Mapping[str, Any]], world: int, reference_s: float) -> dict[str, list[float]]:
    """Core-seconds of each section and step of one rank: medians of the repeats."""
    found: dict[str, list[float]] = {}
    for name in OWN_SECTIONS:
        rows = []
        for record in records:
            share = sum(record["cpu_s_per_rank"]) / world / record["report"]["wall_s"]
            share *= reference_s / record["reference_s"]
            steps = record["report"]["seconds"]["per_step"].get(name)
            if steps is not None:
                rows.append([share * seconds for seconds in steps])
        if rows:
            found[name] = [median(column) for column in zip(*rows, strict=True)]
    return found


def _micro(path: Path, num_ranks: int, overrides: Sequence[str], reference_s: float) -> dict[str, Any]:
    """Experts and exchanges over loopback, and over virtual links where this process may make them."""

    def measured(start: Callable[[Sequence[str], Path], Sequence[subprocess.Popen[bytes]]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="moeca-micro-") as name:
            folder = Path(name)
            out = folder / "micro.json"
            finish(start([MICRO, str(path), str(out), *overrides], folder), TIMEOUT_S, folder)
            return _at_speed(json.loads(out.read_text()), reference_s)

    found = measured(lambda module, logs: start_with_torchrun(module, num_ranks, "cpu", logs))
    exchange = {"loopback": found["exchange"]}
    try:
        require()
    except UserError as error:
        print(f"no table of virtual links: {error}", file=sys.stderr)
    else:
        with Network(num_ranks) as network:
            exchange["links"] = measured(lambda module, logs: start_in_network(module, network, logs))["exchange"]
    return found | {"exchange": exchange}


def _at_speed(found: dict[str, Any], reference_s: float) -> dict[str, Any]:
    """What ``micro_job.py`` measured, as it would have been at the speed of ``reference_s``."""
    measured = found.pop("reference_s")
    experts, exchange = (reference_s / measured[name] for name in ("experts", "exchange"))
    return {name: times(value, exchange if name == "exchange" else experts) for name, value in found.items()}


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

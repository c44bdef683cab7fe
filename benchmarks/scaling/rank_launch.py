"""Starting the ranks of a job (``rank_job.py``) and collecting what they measured."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.hardware import REPOSITORY
from benchmarks.scaling.netns import INTERFACE, Network
from benchmarks.scaling.rank_job import RECORDS, Job
from moeca_dist.errors import UserError

WORKER = "benchmarks.scaling.rank_job"
POLL_S = 0.1
END_TIMEOUT_S = 40  # torchrun waits 30 s for its ranks
MASTER_PORT = 29511
# The last line of a traceback, which torchrun marks with the rank.
RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b.*:")


@dataclass(frozen=True)
class Outcome:
    """``records``: one per cell and repeat, see ``rank_job.measure``; ``samples``: of each cell's first repeat."""

    records: list[dict[str, Any]]
    samples: dict[str, NDArray[np.generic]]


def run_with_torchrun(job: Job, num_ranks: int, device: str, timeout_s: float) -> Outcome:
    """A torchrun job of this machine's own ranks."""

    def start(path: Path) -> list[subprocess.Popen[bytes]]:
        return start_with_torchrun([WORKER, str(path)], num_ranks, device, path.parent)

    return _collect(job, start, timeout_s)


def run_in_network(job: Job, network: Network, timeout_s: float) -> Outcome:
    """One rank per node of ``network``; they meet at node 0's address, as ranks of several machines do."""

    def start(path: Path) -> list[subprocess.Popen[bytes]]:
        return start_in_network([WORKER, str(path)], network, path.parent)

    return _collect(job, start, timeout_s)


def start_with_torchrun(
    module: Sequence[str], num_ranks: int, device: str, logs: Path
) -> list[subprocess.Popen[bytes]]:
    """Run a module with its arguments on all ranks; what they say goes to ``logs``."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    argv += ["-m", *module]
    with (logs / "ranks.log").open("wb") as log:
        return [subprocess.Popen(argv, env=environment(device, "lo"), stdin=subprocess.DEVNULL, stderr=log)]


def start_in_network(module: Sequence[str], network: Network, logs: Path) -> list[subprocess.Popen[bytes]]:
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(network.num_nodes):
        env = environment("cpu", INTERFACE) | {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(network.num_nodes),
            "MASTER_ADDR": network.address(0),
            "MASTER_PORT": str(MASTER_PORT),
        }
        with (logs / f"rank{rank}.log").open("wb") as log:
            processes.append(network.start(rank, [sys.executable, "-m", *module], env, stderr=log))
    return processes


def finish(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float, logs: Path) -> None:
    """Wait for all ranks and end what still runs.

    Raises UserError with the ranks' own words as soon as one failed, or if they take longer than ``timeout_s``.
    """
    try:
        _wait(processes, time.monotonic() + timeout_s, logs)
    finally:
        _end(processes)


def environment(device: str, interface: str) -> dict[str, str]:
    """One thread per rank, the collectives on one interface, and the package of this checkout."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return os.environ | {
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": interface,
        "DS_ACCELERATOR": device,
        "PYTHONPATH": path,
    }


def _collect(job: Job, start: Callable[[Path], Sequence[subprocess.Popen[bytes]]], timeout_s: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="moeca-ranks-") as name:
        folder = Path(name)
        job.write(folder / "job.json")
        finish(start(folder / "job.json"), timeout_s, folder)
        records = json.loads((folder / RECORDS).read_text())
        samples = {cell.name: np.load(folder / f"{index}.npy") for index, cell in enumerate(job.cells)}
    return Outcome(records, samples)


def _wait(processes: Sequence[subprocess.Popen[bytes]], until: float, folder: Path) -> None:
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if time.monotonic() > until:
            raise UserError("the ranks did not finish in time: raise --timeout, or make the job smaller")
        time.sleep(POLL_S)
    if any(process.poll() for process in processes):
        # The others need a moment to say what they saw.
        time.sleep(1.0)
        raise UserError(f"a rank failed: {_last_words(folder)}")


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: asked first, because torchrun ends its ranks only then."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(folder: Path) -> str:
    lines = [line for path in sorted(folder.glob("*.log")) for line in path.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line.startswith("error: ")] or [line for line in lines if RAISED.match(line)]
    return (told or lines or ["it said nothing"])[0 if told else -1]

"""A real Ray cluster of two raylets on this machine, a batch running on it, and blows to any of its processes.

Shared by the tests of the batch runner and the soak (``soak.py``). Processes are found below the cluster's own
raylets and killed by their id; other clusters on the machine are left alone.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil
from ray.cluster_utils import Cluster

from benchmarks.common.hardware import REPOSITORY

OBJECT_STORE_BYTES = 100_000_000
POLL_S = 0.002

Target = Literal["rank 0", "rank 1", "gang", "raylet", "supervisor", "driver"]
Phase = Literal["start", "chunk", "commit"]
TARGETS: tuple[Target, ...] = ("rank 0", "rank 1", "gang", "raylet", "supervisor", "driver")
PHASES: tuple[Phase, ...] = ("start", "chunk", "commit")


class TwoRaylets:
    """A head and a second node; the drivers of batches run beside the head."""

    def __init__(self, cpus_per_node: int = 2) -> None:
        self._cpus = cpus_per_node
        # Not pytest's folder: the paths of Ray's sockets must be short.
        self._folder = tempfile.mkdtemp(prefix="moeca-ray-", dir="/tmp")
        self._environment = {"RAY_TMPDIR": self._folder, "RAY_USAGE_STATS_ENABLED": "0"}
        self._before = {name: os.environ.get(name) for name in self._environment}
        os.environ.update(self._environment)
        options: dict[str, Any] = {"num_cpus": cpus_per_node, "object_store_memory": OBJECT_STORE_BYTES}
        self._options = options
        self._cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
        self._second = self._cluster.add_node(**options)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def __enter__(self) -> "TwoRaylets":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cluster.shutdown()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self, title: str) -> list[psutil.Process]:
        """Workers of this cluster whose title starts so, e.g. ``ray::Supervisor``."""
        found = []
        for node in (self._cluster.head_node, self._second):
            with suppress(psutil.Error, AttributeError):
                for process in psutil.Process(_raylet(node)).children(recursive=True):
                    with suppress(psutil.Error, IndexError):
                        if process.cmdline()[0].startswith(title):
                            found.append(process)
        return found

    def kill_second_raylet(self) -> None:
        os.kill(_raylet(self._second), signal.SIGKILL)

    def replace_second_node(self) -> None:
        """A new node in place of the one whose raylet was killed."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(**self._options)

    def second_node_pids(self) -> set[int]:
        """Processes of the second node."""
        with suppress(psutil.Error):
            return {process.pid for process in psutil.Process(_raylet(self._second)).children(recursive=True)}
        return set()


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


class BatchRun:
    """``launch/ray_generate.py`` in a process of its own, its log read line by line."""

    def __init__(self, address: str, out: Path, arguments: Iterable[str]) -> None:
        self.out = out
        self.lines: list[tuple[float, str]] = []
        command = [sys.executable, "launch/ray_generate.py", "--address", address, "--out", str(out), *arguments]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def log(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def find(self, pattern: str, since: float = 0.0) -> list[tuple[float, re.Match[str]]]:
        """Matches in the log with the time at which each line came."""
        found = ((at, re.search(pattern, line)) for at, line in list(self.lines) if at >= since)
        return [(at, match) for at, match in found if match is not None]

    def pids(self, gang: int) -> list[int]:
        """The processes of a gang by rank, as it was last started; empty before."""
        found = self.find(rf"gang {gang} starts on .*: processes ([\d ]+)")
        return [int(pid) for pid in found[-1][1][1].split()] if found else []

    def wait(self, timeout_s: float) -> int:
        """The exit code; kills the run and raises TimeoutError with its log where it takes longer."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise TimeoutError(f"the batch did not end within {timeout_s:g} s:\n{self.log}") from None
        self._reader.join(5)
        return code

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for(condition: Callable[[], Any], timeout_s: float, run: BatchRun) -> Any:
    """What ``condition`` returns when it is true; None when the run ends before, or nothing happens in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        if not run.running:
            return None
        time.sleep(POLL_S)
    return None


@dataclass
class Blow:
    """One kill: what was hit, when, and how long until the gang it hit generated again (None where none was hit)."""

    target: Target
    phase: Phase
    gang: int | None
    at: float
    recovery_s: float | None = None


def strike(cluster: TwoRaylets, run: BatchRun, target: Target, phase: Phase, timeout_s: float = 60.0) -> Blow | None:
    """Wait for the phase and kill; None where the run ended before. The second node is replaced at once."""
    gang = _await_phase(run, phase, timeout_s)
    if gang is None:
        return None
    victims = _victims(cluster, run, target, gang)
    if not victims:
        return None
    at = time.monotonic()
    hit = [number for number in (0, 1) if set(run.pids(number)) & set(victims)]
    if target == "raylet":
        on_node = cluster.second_node_pids()
        hit = [number for number in (0, 1) if set(run.pids(number)) & on_node]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if target == "raylet":
        cluster.replace_second_node()
    return Blow(target, phase, hit[0] if hit and target != "driver" else None, at)


def _victims(cluster: TwoRaylets, run: BatchRun, target: Target, gang: int) -> list[int]:
    pids = run.pids(gang)
    match target:
        case "rank 0" | "rank 1":
            return pids[int(target[-1]) :][:1]
        case "gang":
            return pids
        case "raylet":
            return [_raylet(cluster._second)]
        case "supervisor":
            return [process.pid for process in cluster.processes("ray::Supervisor")]
        case "driver":
            return [run.process.pid]


def _await_phase(run: BatchRun, phase: Phase, timeout_s: float) -> int | None:
    """The number of a gang that is in the phase (for ``commit``: one that is ready while files are written)."""

    def starting() -> list[int]:
        return [gang for gang in (0, 1) if _state(run, gang) == "starts"]

    def generating() -> list[int]:
        # Every gang that is ready is at some chunk, but for a few milliseconds between two.
        return [gang for gang in (0, 1) if _state(run, gang) == "is ready"]

    def committing() -> list[int]:
        # A writer that was killed leaves its files until the next one opens the folder: not before a gang is ready.
        return generating() if (run.out / ".pending").exists() else []

    found = wait_for({"start": starting, "chunk": generating, "commit": committing}[phase], timeout_s, run)
    return found[0] if found else None


def _state(run: BatchRun, gang: int) -> str | None:
    found = run.find(rf"gang {gang} (starts|is ready|was lost)")
    return found[-1][1][1] if found else None


def note_recovery(run: BatchRun, blow: Blow) -> None:
    """Fill in from the log when the gang that was hit had an image in the making again."""
    if blow.gang is None:
        return
    found = run.find(rf"gang {blow.gang} generates again", since=blow.at)
    if found:
        blow.recovery_s = found[0][0] - blow.at


def plain_run(out: Path, arguments: Iterable[str]) -> None:
    """What every batch must reproduce: the same images from two ranks under torchrun, in processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["launch/generate.py", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def problems(out: Path, reference: Path, num_images: int) -> list[str]:
    """What is wrong with a finished batch: every index exactly once, right checksums, images of the plain run."""
    found = []
    images = sorted(path.name for path in (out / "images").iterdir())
    if images != [f"{index:06d}.png" for index in range(num_images)]:
        found.append(f"{len(images)} images: {images[:3]} ... {images[-3:]}")
    recorded: dict[str, str] = {}
    for line in (out / "manifest.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "chunk":
            twice = recorded.keys() & set(record["files"])
            found += [f"{name} is recorded twice" for name in twice]
            recorded |= dict(zip(record["files"], record["sha256"], strict=True))
    if sorted(recorded) != [f"images/{name}" for name in images]:
        found.append(f"the manifest records {len(recorded)} images")
    for name, checksum in recorded.items():
        content = (out / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != checksum:
            found.append(f"{name} differs from its checksum")
        if content != (reference / name).read_bytes():
            found.append(f"{name} differs from the plain run")
    left = {path.name for path in out.iterdir()} - {
        "images",
        "manifest.jsonl",
        "samples.npz",
        "grid.png",
        "config.yaml",
        "report.json",
    }
    found += [f"{name} is left over" for name in sorted(left)]
    return found

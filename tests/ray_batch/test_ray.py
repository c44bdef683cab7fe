"""Batches on a real Ray cluster of two raylets: the images of a plain run, whatever is killed, stopped or full."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.ray.chaos import BatchRun, Phase, Target, TwoRaylets, plain_run, problems, strike, wait_for
from moeca_dist import Request
from moeca_dist.cli import batch_main, generate_main
from moeca_dist.config import load_config
from moeca_dist.errors import IncompleteError
from moeca_dist.ray_batch.start import Options, start_batch
from moeca_dist.report.tables import read_report
from tests.helpers.faulty_workers import PoisonedChunkWorker

# Half a minute or more each, and none of them needed to see that batches survive what is killed.
lasting = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# More images than a test needs: kills wait for something to happen, and there must be work left when it does.
NUM_IMAGES = 480
OVERRIDES = ["sampling.num_steps=8", "sampling.batch_size=4", "cache.policy=moeca_forecast", "cache.interval=3"]
COMMON = ["--config", str(ROOT / "configs/demo.yaml"), *(part for key in OVERRIDES for part in ("--set", key))]
END_TIMEOUT_S = 300


def gangs_of_two(num_images: int = NUM_IMAGES, gangs: int = 2) -> list[str]:
    return [*COMMON, "--gangs", str(gangs), "--gang-size", "2", "--num-images", str(num_images)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoRaylets]:
    with TwoRaylets() as raylets:
        yield raylets


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images from a plain run of two ranks; those of a shorter run are the first of them."""
    out = tmp_path_factory.mktemp("plain") / "out"
    plain_run(out, [*COMMON, "--num-images", str(NUM_IMAGES)])
    return out


@pytest.fixture
def batch(cluster: TwoRaylets, tmp_path: Path) -> Iterator["Starter"]:
    starter = Starter(cluster, tmp_path / "out")
    yield starter
    starter.end()


class Starter:
    """Starts runs of one batch, and ends what is left of them."""

    def __init__(self, cluster: TwoRaylets, out: Path) -> None:
        self.cluster = cluster
        self.out = out
        self.runs: list[BatchRun] = []

    def __call__(self, *arguments: str) -> BatchRun:
        self.runs.append(BatchRun(self.cluster.address, self.out, arguments))
        return self.runs[-1]

    def end(self) -> None:
        for run in self.runs:
            run.end()


def finished(run: BatchRun) -> None:
    assert run.wait(END_TIMEOUT_S) == 0, run.log


def test_images_are_those_of_a_plain_run(batch: Starter, tmp_path: Path) -> None:
    count = 20  # the last chunk is not full
    run = batch(*gangs_of_two(count))
    finished(run)
    plain_run(tmp_path / "plain", [*COMMON, "--num-images", str(count)])
    assert problems(batch.out, tmp_path / "plain", count) == []
    samples = np.load(batch.out / "samples.npz")["arr_0"]
    assert all(
        np.array_equal(samples[index, ..., 0], np.asarray(Image.open(batch.out / f"images/{index:06d}.png")))
        for index in range(count)
    )
    assert generate_main([*COMMON, "--num-images", str(count), "--out", str(tmp_path / "alone")]) == 0
    alone = np.load(tmp_path / "alone" / "samples.npz")["arr_0"]
    assert np.abs(samples.astype(int) - alone.astype(int)).max() <= 1
    mine, plain = read_report(batch.out), read_report(tmp_path / "alone")
    assert all(mine[section] == plain[section] for section in ("flops", "branches", "requests"))
    assert mine["num_images"] == count and mine["batch"]["chunks"] == 3 and mine["batch"]["runs"] == 1
    assert load_config(batch.out / "config.yaml") == load_config(
        ROOT / "configs/demo.yaml", [*OVERRIDES, "parallel.ep_size=2"]
    )


KILLS: list[list[tuple[Target, Phase]]] = [
    [("rank 0", "chunk"), ("rank 1", "start"), ("supervisor", "commit"), ("gang", "chunk"), ("rank 0", "start")],
    [("raylet", "chunk"), ("rank 1", "chunk"), ("driver", "commit"), ("gang", "commit"), ("supervisor", "chunk")],
    [("driver", "chunk"), ("raylet", "start"), ("rank 0", "commit"), ("supervisor", "start"), ("gang", "start")],
]


@pytest.mark.parametrize("kills", KILLS, ids=["ranks", "nodes", "drivers"])
def test_kills_cost_time_and_nothing_else(batch: Starter, reference: Path, kills: list[tuple[Target, Phase]]) -> None:
    """Each list has at most one driver in it, so each batch ends after at most one --resume."""
    arguments = gangs_of_two()
    run = batch(*arguments)
    for target, phase in kills:
        blow = strike(batch.cluster, run, target, phase)
        assert blow is not None, f"nothing to kill for {target} at {phase}:\n{run.log}"
        if target == "driver":
            assert run.wait(END_TIMEOUT_S) == -signal.SIGKILL
            run = batch(*arguments, "--resume")
    finished(run)
    assert problems(batch.out, reference, NUM_IMAGES) == []
    assert np.array_equal(*(np.load(out / "samples.npz")["arr_0"] for out in (batch.out, reference)))


@lasting
def test_a_hung_rank_and_sigterm(batch: Starter, reference: Path) -> None:
    run = batch(*gangs_of_two(), "--progress-timeout", "8")
    pids = wait_for(lambda: run.find("gang 0 is ready") and run.pids(0), 120, run)
    assert pids, run.log
    os.kill(pids[1], signal.SIGSTOP)
    assert wait_for(lambda: run.find("gang 0 generates again"), 120, run), run.log
    assert run.find(r"gang 0 was lost while generating: rank \d hangs: no step for 8 s"), run.log
    assert not Path(f"/proc/{pids[1]}").exists(), "a stopped process must not stay"
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, run.log
    assert "Traceback" not in run.log and run.find("stopped by SIGTERM"), run.log
    assert sorted(path.name for path in batch.out.iterdir()) == ["images", "manifest.jsonl"]
    finished(batch(*gangs_of_two(), "--resume"))
    assert problems(batch.out, reference, NUM_IMAGES) == []


@lasting
def test_a_gang_that_never_comes_and_sigint(batch: Starter, reference: Path) -> None:
    """Five gangs where two have room: the others wait and are reported, the two do all the work."""
    run = batch(*gangs_of_two(gangs=5))
    assert wait_for(lambda: run.find("gang [234] waits for"), 120, run), run.log
    assert run.find(r"the cluster holds 2 of 5 gangs of 2 ranks of 1 CPU, on one node"), run.log
    assert wait_for(lambda: (batch.out / "images").is_dir(), 120, run), run.log
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT, run.log
    path = batch.out / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    run = batch(*gangs_of_two(gangs=5), "--resume")
    finished(run)
    assert run.find("is damaged; going on from the"), run.log
    assert problems(batch.out, reference, NUM_IMAGES) == []


def test_a_gang_that_no_node_can_hold(batch: Starter) -> None:
    run = batch(*COMMON, "--gangs", "1", "--gang-size", "3", "--num-images", "9", "--placement-timeout", "1")
    assert run.wait(END_TIMEOUT_S) == 2, run.log
    assert run.find("error: the cluster cannot hold a single gang of 3 ranks of 1 CPU, on one node; its nodes have")


@lasting
def test_a_chunk_that_always_fails(cluster: TwoRaylets, reference: Path, tmp_path: Path) -> None:
    options = Options(
        config=load_config(ROOT / "configs/demo.yaml", OVERRIDES),
        folder=tmp_path / "out",
        resume=False,
        jobs=None,
        num_images=24,
        labels=None,
        seed=0,
        gangs=1,
        bundles=(1, 1),
        strategy="STRICT_PACK",
        address=cluster.address,
        dashboard=False,
        start_timeout_s=120,
        progress_timeout_s=120,
        placement_timeout_s=60,
        worker=PoisonedChunkWorker,
    )
    with pytest.raises(IncompleteError, match=r"images 8-15 are missing: their chunks failed 3 times \(rank 0"):
        start_batch(options)
    report = read_report(tmp_path / "out")
    assert [entry["chunk"] for entry in report["batch"]["quarantined"]] == [1]
    assert report["num_images"] == 16 and report["batch"]["retries"] == 2
    assert len(np.load(tmp_path / "out" / "samples.npz")["arr_0"]) == 16
    arguments = [*gangs_of_two(24, gangs=1), "--address", cluster.address, "--out", str(tmp_path / "out"), "--resume"]
    assert batch_main(arguments) == 0
    assert problems(tmp_path / "out", reference, 24) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte; needs root."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mounted
    time.sleep(1)
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@lasting
def test_a_full_disk(cluster: TwoRaylets, small_disk: Path, reference: Path) -> None:
    out = small_disk / "out"
    run = BatchRun(cluster.address, out, gangs_of_two())
    assert run.wait(END_TIMEOUT_S) == 1, run.log
    assert run.find(r"error: cannot write to .*: No space left on device; what is recorded stays"), run.log
    assert not (out / ".pending").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run = BatchRun(cluster.address, out, [*gangs_of_two(), "--resume"])
    finished(run)
    assert run.find("checking [1-9]")
    assert problems(out, reference, NUM_IMAGES) == []


def test_one_command_on_a_laptop(tmp_path: Path) -> None:
    """No cluster: it brings its own, and takes it away again."""
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"label": 3, "seed": 5, "count": 2}\n{"label": 7}\n')
    run = BatchRun("local", tmp_path / "out", [*COMMON, "--jobs", str(jobs)])
    finished(run)
    assert not run.find("Traceback")
    from moeca_dist import Engine

    engine = Engine.from_config(load_config(ROOT / "configs/demo.yaml", OVERRIDES))
    images, _ = engine.generate([Request(0, 3, 5), Request(1, 3, 5), Request(2, 7, 0)])
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], images)

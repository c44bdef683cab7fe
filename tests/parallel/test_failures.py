"""A rank that dies or hangs ends the run of all others with one clear line, within the timeout, and leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.golden_files import load_golden
from tests.helpers.ranks import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 5
START_LIMIT_S = 90
# What a run needs beyond the timeout: noticing, unwinding, leaving the interpreter, on a busy machine.
GRACE_S = 30


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def write_config(folder: Path, parallel: str = "", more: str = "", **options: object) -> Path:
    """An endless run: more steps than any test waits for."""
    golden = load_golden("dsmoe_e8")
    golden.write_checkpoint(folder / "model.pt")
    model = "".join(f"  {name}: {value}\n" for name, value in (golden.options | options).items())
    path = folder / "config.yaml"
    path.write_text(
        f"model:\n  checkpoint: model.pt\n  device: cpu\n{model}"
        f"parallel:\n  timeout_s: {TIMEOUT_S}\n{parallel}sampling:\n  num_steps: 1000000\n{more}"
    )
    return path


def start_ranks(config: Path, out: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    command = [sys.executable, "launch/generate.py", "--config", str(config), "--out", str(out), "--num-images", "2"]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(out.parent / f"rank{rank}.log").open("w"),
            text=True,
        )
        for rank in range(count)
    ]


def wait_until_denoising(out: Path, ranks: list[subprocess.Popen[str]]) -> None:
    log = out.parent / "rank0.log"
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert all(rank.poll() is None for rank in ranks), log.read_text()
        if re.search(r"\dstep/s", log.read_text()):
            return
        time.sleep(0.1)
    raise AssertionError(f"no progress within {START_LIMIT_S} s:\n{log.read_text()}")


@pytest.mark.parametrize("lost", [0, 1], ids=["rank 0", "rank 1"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_rank_ends_the_run(config: Path, tmp_path: Path, blow: signal.Signals, lost: int) -> None:
    lose_a_rank(config, tmp_path, blow, lost, "lost contact while")


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_lost_in_an_agreement(tmp_path: Path, blow: signal.Signals) -> None:
    """All experts for every token: no route changes, so after step 0 the ranks only agree that nothing travels."""
    cache = "cache:\n  policy: moeca_forecast\n  full_steps: [0]\n"
    config = write_config(tmp_path, "", cache, num_experts_per_tok=8)
    lose_a_rank(config, tmp_path, blow, 1, "lost contact while agreeing on row counts")


def lose_a_rank(config: Path, tmp_path: Path, blow: signal.Signals, lost: int, said: str) -> None:
    out = tmp_path / "out"
    ranks = start_ranks(config, out)
    try:
        wait_until_denoising(out, ranks)
        ranks[lost].send_signal(blow)
        struck = time.monotonic()
        survivor = ranks[1 - lost]
        assert survivor.wait(TIMEOUT_S + GRACE_S) == 1
        assert time.monotonic() - struck < TIMEOUT_S + GRACE_S
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    log = (tmp_path / f"rank{1 - lost}.log").read_text()
    message = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and said in message[0], log
    assert "Traceback" not in log
    assert not out.exists()
    if lost == 1:
        assert not list(tmp_path.glob(".out*")), "rank 0 survived and must leave no partial folder"


def test_a_rank_that_never_comes(config: Path, tmp_path: Path) -> None:
    """One of two ranks was not started: the other gives up after the timeout and says what it waited for."""
    first, second = start_ranks(config, tmp_path / "out")
    second.kill()
    try:
        assert first.wait(TIMEOUT_S + GRACE_S) == 1
    finally:
        first.kill()
        second.wait()
    log = (tmp_path / "rank0.log").read_text()
    assert "error: the ranks did not all meet within 5 s" in log and "Traceback" not in log, log
    assert not list(tmp_path.glob("*out*"))

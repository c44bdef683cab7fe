"""Seconds by section: exclusive, complete, and the same sections whatever the rank or the policy."""

import time
from pathlib import Path
from typing import Any

import pytest

from moeca_dist import Engine, Request
from moeca_dist.cache.policies import POLICIES
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.timing import Seconds, SectionTimer
from tests.helpers.golden_files import load_golden

NUM_STEPS = 6


def test_inner_sections_take_their_time_from_outer_ones() -> None:
    timer = SectionTimer("cpu")
    for step in range(2):
        with timer.section("other"):
            with timer.section("experts"):
                time.sleep(0.02)
                with timer.section("exchange"), timer.section("exchange"):
                    time.sleep(0.04)
                time.sleep(0.02)
            timer.end_step(step)
        time.sleep(0.05)  # nothing is open
    seconds = timer.per_step()
    assert set(seconds) == {(step, name) for step in range(2) for name in ("other", "experts", "exchange")}
    for step in range(2):
        assert seconds[step, "experts"] == pytest.approx(0.04, abs=0.015)
        assert seconds[step, "exchange"] == pytest.approx(0.04, abs=0.015)
        assert seconds[step, "other"] < 0.01


def test_sections_close_when_work_fails() -> None:
    timer = SectionTimer("cpu")
    with timer.section("other"):
        with pytest.raises(ValueError), timer.section("experts"):
            raise ValueError
        time.sleep(0.02)
        timer.end_step(0)
    assert timer.per_step()[0, "other"] >= 0.02 > timer.per_step()[0, "experts"]


def test_the_slowest_rank_and_the_mean() -> None:
    seconds = Seconds.of([{(0, "experts"): 1.0, (1, "experts"): 2.0}, {(0, "experts"): 4.0, (0, "wait"): 1.0}], 2)
    assert seconds.slowest == {"experts": 4.0, "wait": 1.0} and seconds.mean == {"experts": 3.5, "wait": 0.5}
    assert seconds.per_step == {"experts": [4.0, 0.0], "wait": [1.0, 0.0]}


def make_config(folder: Path, policy: str) -> Config:
    golden = load_golden("dsmoe_e8")
    path = folder / "model.pt"
    if not path.exists():
        golden.write_checkpoint(path)
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "cache": {"policy": policy} | ({} if policy in ("none", "teacache") else {"full_steps": [0, 1, 4]}),
            "sampling": {"num_steps": NUM_STEPS, "batch_size": 4},
        }
    )


def run(config: Config) -> tuple[Seconds, float]:
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    _, report = engine.generate([Request(index, index % 10) for index in range(8)])
    return report.seconds, report.denoise_s


@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_sections_add_up_to_the_denoising(policy: str, tmp_path: Path) -> None:
    seconds, denoise_s = run(make_config(tmp_path, policy))
    assert sum(seconds.slowest.values()) == pytest.approx(denoise_s, rel=0.05)
    expected = {"attention", "dense", "experts", "other"} | ({"bookkeeping"} if policy != "none" else set())
    assert set(seconds.slowest) == expected and seconds.mean == seconds.slowest
    for name, per_step in seconds.per_step.items():
        assert len(per_step) == NUM_STEPS and sum(per_step) == pytest.approx(seconds.slowest[name])
    # Modules are served in step 2: nothing of them is computed there.
    if policy in ("fora", "taylorseer", "moeca_forecast"):
        assert seconds.per_step["attention"][2] == 0 < seconds.per_step["bookkeeping"][2]


@pytest.mark.parametrize("cache", ["none", "moeca_forecast", "random"])
def test_ranks_also_exchange_and_wait(two_ranks: Any, cache: str, tmp_path: Path) -> None:
    results = two_ranks.run(run, make_config(tmp_path, cache))
    assert results[0][0] == results[1][0]
    assert {"exchange", "wait"} <= set(results[0][0].slowest)

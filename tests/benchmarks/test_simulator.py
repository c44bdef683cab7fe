"""The step simulator: its phases, its CPU table, its validation, and the plan's sanity."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.common import machine_speed
from benchmarks.scaling import netns
from benchmarks.simulator import cpu, measure, plan
from benchmarks.simulator.step import simulate_step, traffic_of_steps
from moeca_dist.errors import UserError
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.tuning.experts.traffic import RowBytes


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, which chooses the accelerator of its own process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return importlib.import_module("benchmarks.simulator.simulate")


def made_trace(keeps: bool = True) -> RoutingTrace:
    """3 steps, 2 MoE layers, 2 halves, 4 images of 8 tokens, top-2 of 8; only step 0 is full, step 2 refreshes none."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((3, 2, 2, 4, 8, 8)), -1)[..., :2].astype(np.uint8)
    fresh = rng.random(ids.shape) < 0.2
    fresh[0], fresh[2] = True, False
    return RoutingTrace(ids, fresh, (1, 3), 8, 64, keeps)


def made_table() -> dict[str, Any]:
    """Every image costs 10 ms of each step; an expert 0.1 ms per row; a leg of an exchange 1 ms and 1 us per byte."""
    compute = {
        str(world): {str(images): {"attention": [0.01 * images] * 3, "experts": [1.0] * 3} for images in (1, 2, 4)}
        for world in (1, 2, 4)
    }
    cells = [{"bytes": 2 * n, "seconds": 2 * (0.001 + 1e-6 * n), "stretch": 1.0} for n in (0, 100, 10_000)]
    exchange = {"agree_s": 0.001, "exact": cells, "coded": cells}
    micro = {
        "experts": {"least_s": 0.0, "per_expert_s": {str(n): 1e-4 * n for n in (1, 2, 256)}},
        "shared_s_per_token": 0.0,
        "exchange": {"loopback": exchange, "links": exchange},
    }
    return {
        "reference_s": 0.04,
        "compute": dict.fromkeys(("uncached", "moeca_forecast", "network_forecast"), compute),
        "micro": {"2": micro, "4": micro},
    }


class Counted:
    """One second for everything, two ranks."""

    def __init__(self) -> None:
        self.agreed: list[int] = []
        self.idle = 0.0

    def home_P(self, step: int) -> np.ndarray:
        return np.array([2.0, 4.0])

    def experts_P(self, rows_PE: np.ndarray) -> np.ndarray:
        return np.array([1.0, 3.0])

    def shared_P(self, full: bool) -> np.ndarray:
        return np.array([0.125, 0.25]) if full else np.zeros(2)

    def stretch(self, traffic: Any) -> float:
        return 1.0

    def together(self, work_P: np.ndarray) -> float:
        return float(work_P.max())

    def agree(self, numbers: int) -> float:
        self.agreed.append(numbers)
        return 0.25

    def send(self, sent_PO: np.ndarray, owners_O: np.ndarray, back: bool, meanwhile_s: float) -> float:
        return 1.0 - meanwhile_s

    def pass_time(self, seconds: float) -> None:
        self.idle += seconds


def test_a_step_is_its_phases() -> None:
    trace, table = made_trace(), PlacementTable.contiguous((1, 3), 8, 2)
    for step, layers in enumerate(traffic_of_steps(trace, table, 2, "home")):
        machine = Counted()
        time = simulate_step(step, layers, machine, full=step == 0)
        assert len(machine.agreed) == 2 and time.agree == 0.25 * 2
        if step == 2:  # nothing travels
            assert (time.home, time.experts, time.exchange) == (4.0, 0.0, 0.0)
        else:
            # In a full step the shared expert hides a quarter of the rows' way there.
            assert (time.home, time.experts, time.exchange) == (4.0, 6.0, 3.5 if step == 0 else 4.0)
            # Of every phase what the mean rank lacks of the slowest: 1 of home, 2 of experts.
            assert time.wait == pytest.approx(3.0)
        assert machine.idle == time.home + time.experts and time.total == time.home + time.experts + time.exchange + (
            time.agree
        )


def test_module_policies_agree_on_nothing_where_no_router_ran() -> None:
    layers = list(traffic_of_steps(made_trace(keeps=False), PlacementTable.contiguous((1, 3), 8, 2), 2, "home"))
    assert layers[2] == [None, None] and None not in layers[0]


def test_coded_rows_are_shorter_and_take_less(simulate) -> None:
    trace, table = made_trace(keeps=False), PlacementTable.contiguous((1, 3), 8, 2)
    # 16 values in fp32; in 8 bits they have a scale.
    (exact, *_), (coded, *_) = (
        next(traffic_of_steps(trace, table, 2, "home", row)) for row in (None, RowBytes.int8(16))
    )
    assert np.array_equal(exact.back_PO / 64, coded.back_PO / 20)
    assert np.array_equal(exact.there_PO - coded.there_PO, exact.back_PO / 64 * (64 - 20))
    times = [
        simulate.predict_run(made_table(), trace, policy, 2, 2.0, netns.Link(1.0, burst_kb=1, mtu=900))[0].exchange
        for policy in ("network_forecast", "network_forecast, int8 rows")
    ]
    assert times[1] < 0.5 * times[0]


def test_work_takes_longer_beside_an_exchange(simulate) -> None:
    trace, table = made_trace(keeps=False), made_table()
    once = simulate.predict_run(table, trace, "network_forecast", 2, 2.0, netns.Link(1.0, burst_kb=1, mtu=900))
    for cell in table["micro"]["2"]["exchange"]["links"]["exact"]:
        cell["stretch"] = 1.5
    more = simulate.predict_run(table, trace, "network_forecast", 2, 2.0, netns.Link(1.0, burst_kb=1, mtu=900))
    assert (more[0].home, more[0].experts) == pytest.approx((1.5 * once[0].home, 1.5 * once[0].experts))
    assert more[2] == once[2]  # nothing travels


def test_tables_are_made_at_one_speed() -> None:
    cell = {"bytes": 10, "seconds": 0.5, "stretch": 1.1}
    measured = {
        "experts": {"least_s": 0.1, "per_expert_s": {"1": 0.2}},
        "shared_s_per_token": 0.3,
        "exchange": {"agree_s": 0.4, "exact": [cell], "coded": [cell]},
        "reference_s": {"experts": 0.02, "exchange": 0.08},
    }
    found = measure._at_speed(measured, 0.04)
    assert found["experts"] == {"least_s": 0.2, "per_expert_s": {"1": 0.4}} and found["shared_s_per_token"] == 0.6
    half = [{"bytes": 10, "seconds": 0.25, "stretch": 1.1}]
    assert found["exchange"] == {"agree_s": 0.2, "exact": half, "coded": half}
    record = {"cpu_s_per_rank": [8.0, 8.0], "reference_s": 0.08, "report": {"wall_s": 10.0}}
    record["report"]["seconds"] = {"per_step": {"attention": [2.0, 1.0]}}
    # Four fifths of the seconds were spent on a core, at half the speed.
    assert measure._by_step([record], 2, 0.04) == {"attention": pytest.approx([0.8, 0.4])}


def test_fixed_work_takes_as_long_as_it_is() -> None:
    little, much = (machine_speed.FixedWork(num_layers=layers) for layers in (1, 8))
    # The best of some, so that a slow moment says nothing; twice the work would be between these bounds too.
    least = [min(work.seconds(turns) for _ in range(5)) for work, turns in ((little, 1), (little, 8), (much, 1))]
    assert all(4 * least[0] < other < 16 * least[0] for other in least[1:])
    assert 0 < machine_speed.reference_seconds(much, None) < 10 * least[2]


def test_a_rank_is_measured_with_each_number_of_images_that_it_may_have() -> None:
    shares = {(images, ranks): measure.shares_to_measure(images, ranks) for images in (1, 4, 7) for ranks in (1, 2)}
    assert shares == {(1, 1): {1}, (1, 2): {1}, (4, 1): {4}, (4, 2): {2}, (7, 1): {7}, (7, 2): {3, 4}}


def test_ranks_share_cores_and_links_take_what_the_bytes_need(simulate) -> None:
    trace, table = made_trace(), made_table()
    # Nothing is refreshed in the last step: it is all of the table.
    assert simulate.predict_run(table, trace, "moeca_forecast", 1, 2.0)[2].total == pytest.approx(0.04 + 1.0)
    two, four = (simulate.predict_run(table, trace, "moeca_forecast", ranks, 2.0) for ranks in (2, 4))
    # Half of the images each; with four ranks two share a core, so nothing is gained.
    assert two[2].home == pytest.approx(1.02) and four[2].home == pytest.approx(2 * 1.01)
    slow = simulate.predict_run(
        table, trace, "moeca_forecast", 2, 2.0, netns.Link(1.0, burst_kb=1, mtu=900), probe_mbit=0.8
    )
    step = next(traffic_of_steps(trace, PlacementTable.contiguous((1, 3), 8, 2), 2, "home"))
    most = sum(max(traffic.there_PO.sum(1).max(), traffic.there_PO.sum(0).max()) for traffic in step) / 1e5
    most += sum(max(traffic.back_PO.sum(1).max(), traffic.back_PO.sum(0).max()) for traffic in step) / 1e5
    # Beyond what the exchange takes without a limit, of which a bucket lets some bytes pass at once.
    assert most - 4 * 1024 / 1e5 <= slow[0].exchange - two[0].exchange <= most
    with pytest.raises(UserError, match="no measurement of 4"):
        cpu.CpuMachine({"compute": {"uncached": {"1": {"1": {}}}}, "micro": table["micro"]}, "uncached", trace, 1, 2.0)
    with pytest.raises(UserError, match="--ranks 8"):
        cpu.CpuMachine(table, "uncached", trace, 8, 2.0)
    del table["micro"]["2"]["exchange"]["links"]
    with pytest.raises(UserError, match="with sudo"):
        cpu.CpuMachine(table, "uncached", trace, 2, 2.0, netns.Link(100.0))


def test_validation_writes_every_error_and_fails_above_the_target(simulate, tmp_path: Path, capsys) -> None:
    trace, table = made_trace(), made_table() | {"conditions": {}}
    (tmp_path / "net.json").write_text(json.dumps(table))
    for policy in ("uncached", "moeca_forecast"):
        trace.save(tmp_path / f"net_{policy}.npz")
    expected = sum(step.total for step in simulate.predict_run(table, trace, "moeca_forecast", 2, 2.0))

    def row(measured: float, num_ranks: int = 2) -> dict[str, Any]:
        return {
            "config": "net", "policy": "moeca_forecast", "num_ranks": num_ranks, "link": None, "measured_link": None,
            "num_images": 4, "num_steps": 3, "cores_used_by_others": 0.0, "seconds": {"exchange": 1.0},
            "reference_s": 0.04,
            "denoise_s": {"median": measured, "low": measured, "high": measured},
        }  # fmt: skip

    sweep = tmp_path / "sweep.json"
    argv = ["--validate", str(sweep), "--tables", str(tmp_path), "--cores", "2", "--out", str(tmp_path / "out")]
    conditions = {"date": "today", "commit": "abc", "note": ""}
    sweep.write_text(json.dumps({"conditions": conditions, "rows": [row(9.9, 1), row(expected * 1.1)]}))
    assert simulate.main(argv) == 0
    written = json.loads((tmp_path / "out" / "data.json").read_text())["rows"]
    assert len(written) == 1 and written[0]["error"] == pytest.approx(1 / 1.1 - 1)
    assert "1 of 1 cells are within 15%" in (tmp_path / "out" / "table.md").read_text()
    sweep.write_text(json.dumps({"conditions": conditions, "rows": [row(expected * 1.3)]}))
    assert simulate.main(argv) == 1
    # A machine that is slower meanwhile takes as much longer, and a sweep that does not know says so.
    sweep.write_text(json.dumps({"conditions": conditions, "rows": [row(expected * 1.3) | {"reference_s": 0.05}]}))
    assert simulate.main(argv) == 0
    (slower,) = json.loads((tmp_path / "out" / "data.json").read_text())["rows"]
    assert slower["slowdown"] == 1.25 and slower["predicted_s"] == pytest.approx(1.25 * expected)
    sweep.write_text(json.dumps({"conditions": conditions, "rows": [row(1.0) | {"reference_s": None}]}))
    assert simulate.main(argv) == 2 and "how fast the machine was" in capsys.readouterr().err
    sweep.write_text(json.dumps({"conditions": conditions, "rows": [row(1.0) | {"num_steps": 7}]}))
    assert simulate.main(argv) == 2 and "measure again" in capsys.readouterr().err


def test_the_plan_keeps_to_what_must_hold(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "SAMPLED_TOKENS", 2048)
    monkeypatch.setattr(plan, "SAMPLED_LAYERS", 1)
    assert plan.main(["--gpus", "8", "64", "--out", str(tmp_path / "plan")]) == 0
    rows = json.loads((tmp_path / "plan" / "data.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {shape.name for shape in plan.SHAPES}
    for row in rows:
        assert row["ep_size"] * row["dp_size"] == row["gpus"] and 0 < row["uncached_exchange_share"] < 1
        assert row["branches_home_ms"] < row["uncached_ms"]
        assert 3.5 < row["network_gain"] < 50 / 11
    for shape in plan.SHAPES:
        widest, island = (
            next(row for row in rows if row["model"] == shape.name and row["gpus"] == 64 and row["ep_size"] == size)
            for size in (64, min(8, shape.num_experts))
        )
        # Leaving the island costs more than it brings; fewer bytes help where they are what takes long.
        assert widest["uncached_ms"] > island["uncached_ms"]
        coded = [row["uncached_ms"] / row["network_coded_ms"] for row in (island, widest)]
        assert coded[1] > max(widest["network_gain"], coded[0])
    assert (tmp_path / "plan" / "plot.png").stat().st_size > 1000
    assert "predictions" in (tmp_path / "plan" / "table.md").read_text()

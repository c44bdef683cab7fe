"""The network benchmark: it measures what it says, refuses what it cannot do, and its figures are the records'."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.scaling import network_report, rank_cases, rank_launch

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, which chooses the accelerator of its own process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return importlib.import_module("benchmarks.scaling.network")


def record(cell: str, repeat: int, seconds: float, sent: int = 0) -> dict[str, Any]:
    report = {
        "num_images": 4,
        "num_steps": 50,
        "denoise_s": seconds,
        "exchange": {"bytes_sent": sent, "collectives": 8, "collectives_skipped": 2},
        "flops": {"speedup": 4.0},
        "seconds": {"mean": {"attention": 1.0, "exchange": seconds / 2}},
    }
    return {
        "cell": cell,
        "repeat": repeat,
        "report": report,
        "peak_bytes_per_rank": [100, 300 + repeat],
        "interface_bytes": sent + 10 - repeat,
        "cores_used_by_others": 0.1 * repeat,
        "reference_s": 0.01 * (1 + repeat),
    }


def outcome(seconds: dict[str, list[float]], shift: float) -> Any:
    records = [record(cell, n, s, 1000) for cell, found in seconds.items() for n, s in reversed(list(enumerate(found)))]
    samples = {cell: np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4) + shift for cell in seconds}
    return rank_launch.Outcome(records, samples)


def test_rows_are_medians_over_paired_repeats() -> None:
    alone = outcome({"uncached": [8.0, 8.0, 9.0], "moeca_forecast": [2.0, 2.0, 2.0]}, 0.0)
    found = outcome({"uncached": [12.0, 10.0, 30.0], "moeca_forecast": [3.0, 4.0, 5.0]}, 1e-7)
    link = {"rate_mbit": 200.0}, {"mbit": 100.0, "round_trip_ms": 0.1}
    uncached, cached = network_report.summarise("demo", 2, *link, found, alone)
    assert cached["link_s"] == pytest.approx(500 * 8 / 100e6)
    assert cached["denoise_s"] == {"median": 4.0, "low": 3.0, "high": 5.0}
    assert cached["over_uncached"] == {"median": 4.0, "low": 2.5, "high": 6.0}
    assert cached["over_one_rank"] == 0.5 and uncached["over_one_rank"] == pytest.approx(8 / 12)
    assert cached["bytes_sent"] == 1000 and cached["interface_bytes"] == 1008
    assert cached["reference_s"] == 0.02
    assert cached["peak_bytes_per_rank"] == 302 and cached["seconds"] == {"attention": 1.0, "exchange": 2.0}
    assert uncached["agrees_with_one_rank"] and cached["agrees_with_one_rank"]
    assert "2 rank(s), 200 Mbit/s, moeca_forecast: 4.00 [3.00-5.00] s" in cached["line"]


def test_samples_that_differ_from_one_rank_are_told() -> None:
    names = ("uncached", "moeca_forecast", "moeca_forecast, owner")
    alone = outcome({name: [1.0] for name in names[:2]}, 0.0)
    found = outcome({name: [1.0] for name in names}, 1e-3)
    rows = network_report.summarise("demo", 2, None, None, found, alone)
    # 1e-3 of a range of 2 is 66 dB: too far for the exact path, near enough for forecasts, no claim for owner.
    assert [row["agrees_with_one_rank"] for row in rows] == [False, True, None]
    rows = network_report.summarise("demo", 2, None, None, outcome({n: [1.0] for n in names}, 1e-2), alone)
    assert [row["agrees_with_one_rank"] for row in rows] == [False, False, None]


def test_coded_rows_have_a_bound_of_their_own() -> None:
    names = ("uncached", "uncached, int8 rows", "network_forecast, int8 rows")
    alone = outcome({"uncached": [1.0], "network_forecast": [1.0]}, 0.0)
    for shift, agrees in ((5e-3, True), (1e-2, False)):  # 52 and 46 dB
        found = outcome({name: [1.0] for name in names}, shift)
        rows = network_report.summarise("demo", 2, None, None, found, alone)
        assert [row["agrees_with_one_rank"] for row in rows] == [False, agrees, agrees]
    rows = network_report.summarise("bench-dsmoe-s-e48", 2, None, None, found, alone, trained=False)
    assert [row["agrees_with_one_rank"] for row in rows] == [False, None, None]
    assert {cell.name for cell in rank_cases.chosen([*names], 1)} == {"uncached", "network_forecast"}
    assert [cell.parallel for cell in rank_cases.chosen([*names], 2)] == [
        {},
        {"row_dtype": "int8"},
        {"row_dtype": "int8"},
    ]
    assert not rank_cases.CODED & {*rank_cases.COMMON}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policies", "taylorseer"], "--policies needs uncached"),
        (["--rates", "-1"], "must be positive"),
        (["--repeats", "0"], "must be positive"),
        (["--configs", "absent"], "absent.yaml does not exist"),
        (["--set", "sampling.steps=3"], "did you mean sampling.num_steps"),
    ],
)
def test_bad_arguments_are_refused(network, argv: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(network, "require", lambda: None)
    assert network.main([*argv, "--out", str(tmp_path / "net")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and not list(tmp_path.iterdir())


def test_without_root_nothing_starts(network, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert network.main(["--out", str(tmp_path / "net")]) == 2
    assert capsys.readouterr().err == "error: network namespaces need root: run the same command with sudo\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.netns
def test_ranks_in_namespaces_generate_what_one_rank_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scaling.network", "--configs", "demo", "--ranks", "2"]
    command += ["--rates", "100", "--no-loopback", "--num-images", "4", "--repeats", "1"]
    command += ["--set", "sampling.num_steps=16"]
    policies = ("uncached", "network_forecast", "network_forecast, int8 rows")
    policies += ("moeca_forecast", "moeca_forecast, owner", "taylorseer")
    command += ["--policies", *policies, "--out", str(tmp_path / "net")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "net" / "data.json").read_text())
    alone = {row["policy"]: row for row in results["rows"] if row["num_ranks"] == 1}
    apart = {row["policy"]: row for row in results["rows"] if row["num_ranks"] == 2}
    assert set(alone) == {"uncached", "network_forecast", "moeca_forecast", "taylorseer"} and set(apart) == {*policies}
    for row in apart.values():
        assert 85 < row["measured_link"]["mbit"] < 102 and row["link"]["rate_mbit"] == 100
        # Rows travel as payload of what the interfaces send, and not faster than two links let them.
        assert 0 < row["bytes_sent"] < row["interface_bytes"] < 1.5 * row["bytes_sent"]
        assert row["denoise_s"]["median"] > row["bytes_sent"] / 2 * 8e-6 / 100
        assert row["agrees_with_one_rank"] in ((None,) if "owner" in row["policy"] else (True,))
    assert all(row["bytes_sent"] == row["interface_bytes"] == 0 for row in alone.values())
    assert apart["uncached"]["rel_l2_to_one_rank"] <= 1e-5
    assert apart["network_forecast, int8 rows"]["bytes_sent"] < 0.3 * apart["network_forecast"]["bytes_sent"]
    assert apart["moeca_forecast"]["bytes_sent"] < apart["uncached"]["bytes_sent"]
    assert apart["moeca_forecast"]["over_uncached"]["median"] > 1
    assert apart["network_forecast"]["over_uncached"]["median"] > 1
    assert results["conditions"]["torch"] and results["conditions"]["commit"]
    assert (tmp_path / "net" / "plot.png").stat().st_size > 1000
    table = [line for line in (tmp_path / "net" / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(results["rows"])

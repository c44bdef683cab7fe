"""The scaling benchmark: real torchrun jobs, figures that follow from their records, and mistakes that are refused."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.scaling import rank_launch, scaling_report

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, which chooses the accelerator of its own process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return importlib.import_module("benchmarks.scaling.scaling")


def outcome(seconds: dict[str, list[float]], num_images: int, batch_size: int) -> Any:
    records = [
        {
            "cell": cell,
            "repeat": repeat,
            "batch_size": batch_size,
            "report": {
                "num_images": num_images,
                "num_steps": 50,
                "denoise_s": value,
                "images_per_s": num_images / value,
                "exchange": {"bytes_sent": 2048},
                "flops": {"speedup": 4.0},
                "seconds": {"mean": {"exchange": 0.25 * value, "wait": 0.5}},
            },
            "peak_bytes_per_rank": [1, 7 + repeat],
            "cores_used_by_others": 0.0,
        }
        for cell, found in seconds.items()
        for repeat, value in enumerate(found)
    ]
    return rank_launch.Outcome(records, {cell: np.zeros(1) for cell in seconds})


def test_speedup_latency_and_efficiency() -> None:
    alone = outcome({"uncached": [8.0, 10.0, 9.0], "moeca_forecast": [2.0, 2.0, 2.5]}, 4, 4)
    rows = list(scaling_report.summarise("demo", "-", 1, alone, []))
    assert [row["speedup"] for row in rows] == [1, 1] and [row["efficiency"] for row in rows] == [1, 1]
    assert rows[1]["over_uncached"] == {"median": 4.0, "low": 3.6, "high": 5.0}
    names = ("uncached", "moeca_forecast", "moeca_forecast, owner")
    four = outcome({name: [4.5, 4.5, 4.5] for name in names}, 4, 1)
    uncached, cached, owner = scaling_report.summarise("demo", "ep", 4, four, rows)
    assert uncached["speedup"] == pytest.approx(2) and uncached["efficiency"] == pytest.approx(0.5)
    # Where there is nothing to place, the same policy stands for placement owner.
    assert cached["speedup"] == owner["speedup"] == pytest.approx(2 / 4.5) and owner["base_ranks"] == 1
    assert uncached["latency_s"]["median"] == 4.5 and uncached["peak_bytes_per_rank"] == 9
    assert uncached["seconds"] == {"exchange": pytest.approx(1.125), "wait": 0.5}


def test_latency_is_that_of_one_round_and_weak_scaling_counts_images() -> None:
    alone = list(scaling_report.summarise("demo", "-", 1, outcome({"uncached": [3.0]}, 6, 2), []))
    assert alone[0]["latency_s"]["median"] == 1.0
    (row,) = scaling_report.summarise("demo", "dp", 2, outcome({"uncached": [4.0]}, 12, 2), alone)
    assert row["latency_s"]["median"] == pytest.approx(4 / 3)
    assert row["speedup"] == pytest.approx(1.5) and row["efficiency"] == pytest.approx(0.75)


def test_torchrun_jobs_of_one_and_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/scaling/scaling.py", "--configs", "demo", "--ranks", "1", "2"]
    command += ["--mode", "weak", "--policies", "uncached", "fora", "--num-images", "2"]
    command += ["--set", "sampling.num_steps=6"]
    command += ["--repeats", "2", "--layouts", "ep", "--device", "cpu", "--out", str(tmp_path / "scaling")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "scaling" / "data.json").read_text())
    assert results["conditions"]["commit"] and results["conditions"]["torch"] and results["conditions"]["cores"]
    rows = {(row["layout"], row["num_ranks"], row["policy"]): row for row in results["rows"]}
    assert set(rows) == {(lay, n, p) for lay, n in (("-", 1), ("ep", 2)) for p in ("uncached", "fora")}
    for (_, num_ranks, _), row in rows.items():
        assert row["num_images"] == 2 * num_ranks and row["repeats"] == 2 and row["base_ranks"] == 1
        assert row["images_per_s"]["low"] <= row["images_per_s"]["median"] <= row["images_per_s"]["high"]
        assert row["efficiency"] == pytest.approx(row["speedup"] / num_ranks)
        assert (row["bytes_sent"] > 0) == (row["seconds"].get("exchange", 0) > 0) == (num_ranks > 1)
        assert 10 * 2**20 < row["peak_bytes_per_rank"] < 4 * 2**30
    assert rows["ep", 2, "fora"]["bytes_sent"] == pytest.approx(rows["ep", 2, "uncached"]["bytes_sent"] / 3, rel=0.1)
    assert (tmp_path / "scaling" / "plot.png").stat().st_size > 1000
    table = [line for line in (tmp_path / "scaling" / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policies", "fora"], "--policies needs uncached"),
        (["--ranks", "0"], "must be positive"),
        (["--configs", "absent"], "absent.yaml does not exist"),
        (["--device", "cuda", "--ranks", "99"], "--ranks 99: torch finds"),
        (["--configs", "dsmoe-s-e16", "--ranks", "1", "--policies", "uncached"], "a rank failed: error: no weights"),
    ],
)
def test_mistakes_are_told_in_one_line(scaling, argv: list[str], message: str, tmp_path: Path, capsys) -> None:
    argv = ["--device", "cpu", *argv, "--out", str(tmp_path / "scaling")]
    assert scaling.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and not list(tmp_path.iterdir())

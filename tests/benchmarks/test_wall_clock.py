"""The wall-clock benchmark on one image: it runs and reports its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_reports_every_policy(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.layer.wall_clock", "--batch-size", "1", "--num-steps", "4", "--threads", "1",
        "--policies", "fora", "moeca_forecast", "--out", str(tmp_path / "clock"),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "clock" / "data.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["none", "fora", "moeca_forecast"]
    for row in rows[1:]:
        assert row["flops_ratio"] > 1.2 and 0 < row["cache_steps"]["bookkeeping"] < row["seconds"]["bookkeeping"]
    assert (tmp_path / "clock" / "table.md").read_text().count("| ") > 20

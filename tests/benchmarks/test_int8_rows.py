"""The benchmark of int8 rows runs on two ranks, and its figures are those of the codes."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_quick_run(tmp_path: Path) -> None:
    options = ["--num-images", "2", "--policies", "taylorseer", "--set", "sampling.num_steps=20"]
    options += ["--set", "cache.policy=none", "--out", str(tmp_path / "rows")]
    command = [sys.executable, "-m", "benchmarks.quality.int8_rows", *options]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows" / "data.json").read_text())["rows"]
    found = {(row["policy"], row["rows"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 3
    for policy in ("uncached", "taylorseer"):
        exact = found[policy, "exact"]
        assert exact["db_to_exact"] == 200
        assert found[policy, "noise"]["rows"] == "noise" and 60 < found[policy, "noise"]["db_to_exact"] < 120
        row = found[policy, "int8"]
        assert 0.25 < row["bytes_sent"] / exact["bytes_sent"] < 0.29 and row["db_to_exact"] > 60
    assert (tmp_path / "rows" / "table.md").read_text().count("| int8 |") == 2

"""The GPU benchmarks at a smoke size on CPU: they run, count what must move, and report every case."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def quick(script: str, out: Path) -> dict[str, Any]:
    options = ["--device", "cpu", "--quick", "--out", str(out / script)]
    command = [sys.executable, "-m", f"benchmarks.layer.{script}", *options]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert (out / script / "table.md").read_text().count("| DSMoE-S-E16 | 1 |") > 0
    return json.loads((out / script / "data.json").read_text())


def test_kernels(tmp_path: Path) -> None:
    results = quick("kernels", tmp_path)
    rows = {row["kernel"]: row for row in results["rows"]}
    tokens, row_bytes = 2 * 256, 384 * 4
    assert set(rows) == {"gather_rows", "serve_branches", "gated_residual", "residual_modulated"}
    assert rows["gated_residual"]["bytes"] == 4 * tokens * row_bytes  # input, value, slope, output
    for row in rows.values():
        floor = row["bytes"] / results["copy_bytes_per_s"]
        assert row["of_limit"] == pytest.approx(floor / row["seconds"])


def test_whole_runs(tmp_path: Path) -> None:
    results = quick("gpu_e2e", tmp_path)
    rows = {row["contender"]: row for row in results["rows"]}
    assert set(rows) == {
        "exact", "network_forecast", "moeca_forecast", "taylorseer", "fora"
    }  # fmt: skip
    assert rows["exact"]["flop_ratio"] == rows["exact"]["speedup"] == 1
    for name in set(rows) - {"exact"}:
        assert rows[name]["flop_ratio"] > 1.2 and rows[name]["cached_step_s"] > 0 and rows[name]["cache_bytes"] > 0

"""The benchmark of `model.compile` on the shipped model: it runs and reports its figures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_it_reports_both(tmp_path: Path) -> None:
    command = [
        sys.executable, "benchmarks/compile.py", "--config", "configs/demo.yaml", "--batch-sizes", "1", "2",
        "--repeats", "1", "--out", str(tmp_path / "compile"),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "compile.json").read_text())
    assert result["compile_s"] > 0 and [row["batch_size"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert 0 < row["relative_l2"] < 1e-5 and row["recompiled"] == 0 and 0 < row["ratio"] < 100

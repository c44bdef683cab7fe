"""The benchmark of the exchange modes runs on two ranks, and its counts are those of the modes."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_quick_run(tmp_path: Path) -> None:
    options = ["--ranks", "2", "--images", "2", "--seeds", "1", "--steps", "20", "--out", str(tmp_path / "exchange")]
    command = [sys.executable, "benchmarks/exchange.py", *options]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "exchange.json").read_text())["rows"]
    for exact, planned in zip(rows[::2], rows[1::2], strict=True):
        assert (exact["mode"], planned["mode"]) == ("exact", "planned")
        # Four MoE layers: each agrees in each step, or in full steps only.
        assert exact["agreements"] == 20 * 4 > planned["agreements"]
        assert exact["bytes_sent"] > planned["bytes_sent"] > 0
        assert min(exact["psnr_db"] + planned["psnr_db"]) > 20
    assert (tmp_path / "exchange.md").read_text().count("| planned |") == 3

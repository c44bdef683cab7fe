"""The layer benchmark on tiny shapes: every contender runs, agrees with the naive loop, and is reported.

Shape suffixes: T tokens, K routed experts per token.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.layer.layer_cases import HOT_EXPERTS, PUBLISHED, Case, Shape, draw_experts

REPOSITORY = Path(__file__).parents[2]
CONTENDERS = {"ours", "classic", "autoep", "naive"}


def test_quick_run_reports_every_contender(tmp_path: Path) -> None:
    options = ["--quick", "--ranks", "1", "2", "--out", str(tmp_path / "layer")]
    command = [sys.executable, "-m", "benchmarks.layer.layer", *options]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "layer" / "data.json").read_text())
    assert "benchmarks.layer.layer --quick" in results["conditions"]["command"]
    assert [case["num_ranks"] for case in results["cases"]] == [1] * 8 + [2] * 8
    for case in results["cases"]:
        assert set(case["relative_error"]) == CONTENDERS
        assert max(case["relative_error"].values()) <= 1e-4
        assert set(case["contenders"]) > CONTENDERS
        assert case["contenders"]["ours"]["ratio_to_ours"] == 1.0
        assert case["best_other_ratio"] == min(
            case["contenders"][name]["ratio_to_ours"] for name in CONTENDERS - {"ours"}
        )
    table = (tmp_path / "layer" / "table.md").read_text().splitlines()
    table_rows = [line for line in table if line.startswith("| tiny-")]
    assert len(table_rows) == len(results["cases"])


@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.name)
@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_routings_are_what_they_are_called(shape: Shape, routing: str) -> None:
    num_tokens = 512
    ids_TK = draw_experts(Case(shape, num_tokens, "full", routing), torch.Generator().manual_seed(0))
    assert ids_TK.shape == (num_tokens, shape.num_experts_per_tok)
    assert (ids_TK.sort(dim=1).values.diff(dim=1) > 0).all(), "a token has an expert twice"
    hot_share = (ids_TK < HOT_EXPERTS).float().mean().item()
    if routing == "skewed":
        assert hot_share == pytest.approx(0.5 if shape.num_experts_per_tok == 2 else 0.4)
    else:
        assert hot_share == pytest.approx(HOT_EXPERTS / shape.num_experts, abs=0.03)

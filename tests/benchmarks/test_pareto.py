"""The Pareto benchmark: it runs, goes on where it stopped, refuses what it cannot compare, and its figures are right.

Shape suffixes: N images, F features.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality.pareto_bytes import count
from benchmarks.quality.pareto_cases import CASES, QUICK, STORAGE, Case, checked
from benchmarks.quality.pareto_report import mark_frontier, unpacked
from benchmarks.quality.pareto_run import Job, Settings, packed
from moeca_dist import UserError
from moeca_dist.config import CacheConfig
from moeca_dist.demo.model_card import SHIPPED_CHECKPOINT
from moeca_dist.parallel.mesh import LauncherEnv, Mesh

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 26  # half of a real run


@pytest.fixture
def pareto(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program in this process: importing torch once more would take longer than the run."""
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, {"OMP_NUM_THREADS": "1"}.get(name, "cpu"))
    threads = torch.get_num_threads()
    yield importlib.import_module("benchmarks.quality.pareto")
    torch.set_num_threads(threads)


def test_a_quick_run_goes_on_where_it_was_interrupted(pareto, tmp_path: Path, monkeypatch, capsys) -> None:
    argv = ["--quick", "--num-steps", str(NUM_STEPS), "--out", str(tmp_path / "pareto")]
    complete = pareto.records

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(complete(*args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(pareto, "records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pareto.main(argv)
    partial = tmp_path / "pareto.jsonl.partial"
    with partial.open("a") as lines:
        lines.write('{"name": "fora')  # killed while writing
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:3]]
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]

    assert pareto.main([*argv, "--num-steps", "40"]) == 2
    assert "is of a run with other settings or another commit: remove it" in capsys.readouterr().err

    monkeypatch.setattr(pareto, "records", complete)
    assert pareto.main(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pareto"]
    assert sorted(path.name for path in (tmp_path / "pareto").iterdir()) == ["data.json", "plot.png", "table.md"]
    results = json.loads((tmp_path / "pareto" / "data.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {"exact", *QUICK}
    for record in kept:
        ratio = record["exact_s"] / record["seconds"]
        assert rows[record["name"]]["per_seed"][0]["wall_ratio"] == pytest.approx(ratio)
    check_quick_rows(rows)
    assert results["conditions"]["checkpoint_sha256"] and results["conditions"]["torch"]
    table = [line for line in (tmp_path / "pareto" / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)


def check_quick_rows(rows: dict[str, dict[str, Any]]) -> None:
    steps, fora, forecast = (rows[name] for name in ("fewer steps: 13 steps", QUICK[0], QUICK[1]))
    assert rows["exact"]["flops_ratio"] == 1 and rows["exact"]["rel_l2"]["mean"] == 0
    assert steps["flops_ratio"] == pytest.approx(NUM_STEPS / 13)
    assert steps["branches_sent_share"] == pytest.approx(13 / NUM_STEPS)
    assert fora["branches_sent_share"] == pytest.approx(7 / NUM_STEPS)
    assert 1.5 < forecast["flops_ratio"] < 5 and forecast["branches_sent_share"] < 0.5
    assert forecast["psnr_db"]["mean"] > steps["psnr_db"]["mean"]
    assert forecast["non_dominated"] and not steps["non_dominated"]
    for row in rows.values():
        assert row["accuracy"]["mean"] >= 0.75 and row["frechet"]["mean"] >= 0 and row["wall_ratio"] > 0.5
    assert [row["flops_ratio"] for row in rows.values()] == sorted(row["flops_ratio"] for row in rows.values())


@pytest.mark.slow
def test_two_workers_and_counted_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quality.pareto", "--num-images", "4", "--seeds", "1", "2"]
    command += ["--batch-size", "2", "--only", "every 5", "--workers", "2", "--bytes-images", "2"]
    command += ["--out", str(tmp_path / "pareto")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "pareto" / "data.json").read_text())["rows"]
    assert len(rows) > 2 and all(len(row["per_seed"]) == 2 for row in rows)
    assert all(row["bytes_share"] == pytest.approx(row["branches_sent_share"], abs=0.05) for row in rows)


def count_on_ranks(settings: Settings, jobs: list[Job]) -> dict[str, int]:
    return count(Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60), settings, jobs, 2)


def test_bytes_are_counted_between_ranks(two_ranks) -> None:
    settings = Settings(str(SHIPPED_CHECKPOINT), "", "", 2, (1,), 4, 1.5, 2)
    jobs = [
        Job("exact", CacheConfig(policy="none"), 4),
        Job("every 2", CacheConfig(policy="fora", interval=2), 4),
        Job("2 steps", CacheConfig(policy="none"), 2),
    ]
    for sent in two_ranks.run(count_on_ranks, settings, jobs):
        assert sent["exact"] > 0
        assert sent["every 2"] == pytest.approx(sent["exact"] / 2, rel=0.1)
        assert sent["2 steps"] == pytest.approx(sent["exact"] / 2, rel=0.1)


def test_every_case_fits_and_has_a_name_of_its_own() -> None:
    every = (*CASES, *STORAGE)
    configs = checked(every, 50, guided=True)
    assert len(configs) == len(every) and set(QUICK) <= set(configs)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case("a", "b", {"policy": "guess"}),
            "configuration 'a: b': policy guess is not registered; known are dice_skip",
        ),
        (Case("a", "b", {"policy": "fora", "interval": 0}), "configuration 'a: b': Input should be greater than"),
        (Case("a", "b", {"policy": "fora", "order": 1}), "cache.order has no effect with cache.policy fora"),
        (Case("a", "b", {"policy": "none"}, 50), "configuration 'a: b': not fewer than the 50 steps"),
    ],
)
def test_cases_that_cannot_run_are_refused(case: Case, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked([case], 50, guided=True)


def test_cases_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two configurations are called 'a: b'"):
        checked([Case("a", "b", {"policy": "fora"}), Case("a", "b", {"policy": "taylorseer"})], 50, guided=True)


def test_bad_arguments_are_refused(pareto, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "pareto")]
    for argv, message in (
        (["--only", "nothing"], "no configuration's name contains 'nothing'"),
        (["--num-images", "1"], "--num-images must be at least 2"),
        (["--checkpoint", "absent"], "absent does not exist"),
    ):
        assert pareto.main([*argv, *out]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_what_nothing_else_beats_is_marked() -> None:
    points = {"a": (2, 50), "worse": (2, 40), "b": (4, 45), "beaten": (3, 44), "c": (5, 30), "twin": (4, 45)}
    rows = [{"name": name, "flops_ratio": r, "psnr_db": {"mean": p}} for name, (r, p) in points.items()]
    mark_frontier(rows)
    assert [row["name"] for row in rows if row["non_dominated"]] == ["a", "b", "c", "twin"]


def test_pictures_survive_the_partial_file() -> None:
    images_NHWC = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    assert np.array_equal(unpacked(json.loads(json.dumps(packed(images_NHWC)))), images_NHWC)


def test_calibrated_configurations_get_a_file_of_their_own(pareto, tmp_path: Path, monkeypatch) -> None:
    fitting = importlib.import_module("benchmarks.quality.pareto_calibration")
    monkeypatch.setattr(fitting, "NUM_IMAGES", 4)
    plain = CacheConfig(policy="network_forecast", interval=4)
    configs = {"net, calibrated: every 4": plain, "net: every 4": plain}
    arguments = (configs, ["net, calibrated: every 4"], str(SHIPPED_CHECKPOINT), 8, 1.5, tmp_path / "fitted")
    found = fitting.with_calibrations(*arguments)
    assert found["net: every 4"] == plain
    path = found["net, calibrated: every 4"].calibration
    assert path == tmp_path / "fitted" / "net_calibrated_every_4.json"
    written = path.stat().st_mtime_ns
    assert fitting.with_calibrations(*arguments) == found and path.stat().st_mtime_ns == written
    assert Job("net", found["net, calibrated: every 4"], 8).options["calibration"] == "fitted"


def test_images_that_calibrations_were_fitted_on_are_not_measured(pareto, tmp_path: Path, capsys) -> None:
    assert pareto.main(["--seeds", "7", "101", "--quick", "--out", str(tmp_path / "x")]) == 2
    assert "measure others" in capsys.readouterr().err

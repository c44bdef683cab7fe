"""``moeca report``: the figures per block, step and expert are right, and are shown.

Shape suffixes: L experts of this rank.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moeca_dist import Engine, Request, UserError
from moeca_dist.cli import main
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.report.plots import write_plots
from moeca_dist.report.tables import read_report, render
from tests.helpers.golden_files import load_golden

FULL_STEPS = [0, 1, 4]
NUM_STEPS = 6


def make_config(folder: Path, **cache: Any) -> Config:
    golden = load_golden("dsmoe_e8")
    path = folder / "model.pt"
    if not path.exists():
        golden.write_checkpoint(path)
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "cache": cache,
            "sampling": {"num_steps": NUM_STEPS, "batch_size": 2},
        }
    )


def requests(count: int) -> list[Request]:
    return [Request(index, index % 10, seed=5) for index in range(count)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a branch cache on one rank."""
    folder = tmp_path_factory.mktemp("report")
    config = make_config(folder, policy="random", ratio=0.2, full_steps=FULL_STEPS)
    (folder / "run.yaml").write_text(config.to_yaml())
    argv = ["generate", "--config", str(folder / "run.yaml"), "--out", str(folder / "out"), "--num-images", "3"]
    assert main(argv) == 0
    return folder / "out"


def test_counts_per_step_and_expert_are_those_of_the_layers(tmp_path: Path) -> None:
    engine = Engine.from_config(make_config(tmp_path, policy="random", ratio=0.2, full_steps=FULL_STEPS))
    computed: dict[int, torch.Tensor] = {}
    for block, layer in engine.model.moe_layers():

        def count(_: Any, inputs: tuple[torch.Tensor, torch.Tensor], block: int = block) -> None:
            computed[block] = computed.get(block, 0) + inputs[1]

        layer.experts.register_forward_pre_hook(count)
    _, report = engine.generate(requests(3))
    for entry in report.cache.per_layer:
        assert entry["refreshed_per_expert"] == computed[entry["block"]].tolist()
        reasons = ("full", "unmatched", "score", "forced")
        total = sum(entry[reason] for reason in reasons)
        for reason in (*reasons, "served"):
            assert sum(entry["per_step"][reason]) == sum(entry["per_expert"][reason]) == entry[reason]
        assert sum(entry["refreshed_per_step"]) == sum(entry["refreshed_per_expert"]) == total
        routed = total + entry["served"]
        full = [step for step, count in enumerate(entry["refreshed_per_step"]) if count == routed // NUM_STEPS]
        assert full == FULL_STEPS and len(entry["refreshed_per_step"]) == NUM_STEPS


def spread(config: Config) -> dict[str, Any]:
    mesh = Mesh.create(LauncherEnv.read(), ep_size=2, device_type="cpu", timeout_s=60)
    _, report = Engine.from_config(config, mesh=mesh).generate(requests(5))
    return json.loads(report.to_json())


def test_ranks_add_up(two_ranks, tmp_path: Path) -> None:
    """Two rounds of two ranks, the last with one image: the same counts as alone, and all bytes in some step."""
    config = make_config(tmp_path, policy="moeca_forecast", full_steps=FULL_STEPS)
    alone = json.loads(Engine.from_config(config).generate(requests(5))[1].to_json())
    for report in two_ranks.run(spread, config):
        assert report["cache"]["per_layer"] == alone["cache"]["per_layer"]
        sent = report["exchange"]["bytes_per_step"]
        assert len(sent) == NUM_STEPS and sum(sent) == report["exchange"]["bytes_sent"] > 0
        assert min(sent[step] for step in FULL_STEPS) > max(
            sent[step] for step in range(NUM_STEPS) if step not in FULL_STEPS
        )
        printed = render(report)
        assert "DP 1 x EP 2" in printed and "at the home rank" in printed
        names = [path.name for path in write_plots(report, tmp_path)]
        assert names == [
            "seconds_per_step.png", "refreshed_per_step.png", "refreshed_per_expert.png", "bytes_per_step.png",
        ]  # fmt: skip
    assert alone["exchange"]["bytes_per_step"] == []


def test_the_command_prints_tables_and_draws(out: Path, capsys) -> None:
    assert main(["report", str(out), "--plots"]) == 0
    printed = capsys.readouterr().out
    assert "Seconds of denoising" in printed and "bookkeeping" in printed
    report = read_report(out)
    assert "3 in 6 steps" in printed and "in full steps" in printed and "by score" in printed
    assert any(line.split() == ["policy", "random"] for line in printed.splitlines())
    assert f"{report['branches']['refreshed']:,}" in printed and "nothing travels" in printed
    for entry in report["cache"]["per_layer"]:
        assert f"{entry['unmatched']:,}" in printed and f"{entry['served']:,}" in printed
    drawn = sorted(path.name for path in (out / "plots").iterdir())
    assert drawn == ["refreshed_per_expert.png", "refreshed_per_step.png", "seconds_per_step.png"]
    for name in drawn:
        assert Image.open(out / "plots" / name).width > 500
        assert str(out / "plots" / name) in printed


def test_a_run_without_a_cache_has_less_to_show(tmp_path: Path, capsys) -> None:
    _, report = Engine.from_config(make_config(tmp_path)).generate(requests(1))
    (tmp_path / "report.json").write_text(report.to_json())
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "none: everything was computed" in printed and "Branches of each MoE block" not in printed
    assert "attention" in printed and "bookkeeping" not in printed
    assert main(["report", str(tmp_path), "--plots"]) == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["seconds_per_step.png"]


def test_a_compared_run_shows_its_quality(out: Path) -> None:
    report = read_report(out) | {"wall_speedup": 1.5, "quality": {"psnr_db": 47.25, "ssim": 0.99, "rel_l2": 0.01}}
    assert "1.50x faster than without a cache" in render(report) and "PSNR 47.2 dB" in render(report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no report.json: give the folder that `moeca generate --out` wrote"),
        ("{", "cannot read"),
        ("[]", "is not a report of this program (it has no 'flops')"),
        ('{"flops": {}, "branches": {}, "exchange": {}}', "it has no 'cache'"),
    ],
)
def test_foreign_folders_are_refused(tmp_path: Path, capsys, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_missing_folder_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent is not a folder" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "required: OUT" in capsys.readouterr().err


def test_a_report_of_another_version_is_refused(out: Path) -> None:
    report = read_report(out)
    del report["branches"]["unmatched"]
    with pytest.raises(UserError, match="another version of this program"):
        render(report)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"policy": "moeca_forecast"}, {"full_step", "unmatched"}),
        ({"policy": "moeca"}, {"full_step", "unmatched", "score"}),
        ({"policy": "random", "ratio": 0.3}, {"full_step", "unmatched", "score"}),
        ({"policy": "dice_skip"}, {"full_step", "unmatched", "forced"}),
        ({"policy": "toca", "ratio": 0.3}, {"full_step", "forced"}),
        ({"policy": "fora"}, {"full_step"}),
    ],
    ids=lambda value: value["policy"] if isinstance(value, dict) else None,
)
def test_refreshed_branches_have_a_reason(tmp_path: Path, options: dict[str, Any], reasons: set[str]) -> None:
    engine = Engine.from_config(make_config(tmp_path, full_steps=FULL_STEPS, **options))
    computed: list[int] = []
    for _, layer in engine.model.moe_layers():
        layer.experts.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[0]))
    _, report = engine.generate(requests(3))
    branches = json.loads(report.to_json())["branches"]
    counts = {reason: branches[reason] for reason in ("full_step", "unmatched", "score", "forced")}
    assert {reason for reason, count in counts.items() if count} == reasons
    assert sum(counts.values()) == branches["refreshed"] == sum(computed)
    assert branches["routed"] - branches["refreshed"] == branches["reused"] + branches["forecast"]
    for entry in report.cache.per_layer:
        assert sum(entry["per_step"]["full"][step] for step in FULL_STEPS) == entry["full"] > 0
    every = 3 * 2 * NUM_STEPS * engine.model.spec.num_tokens * engine.model.spec.depth
    if options["policy"] != "dice_skip":
        assert sum(report.cache.modules["attention"].values()) == every
        rows = {name: counts["rows"] for name, counts in report.cache.modules.items() if counts["rows"]}
        assert set(rows) == {"moeca": {"attention", "shared", "dense"}, "toca": {"dense", "moe"}}.get(
            options["policy"], set()
        )
    assert render(json.loads(report.to_json()))

"""``--quality`` and ``--target-psnr`` of generate, and the tune command: files read and written, what is refused."""

import json
from pathlib import Path

import pytest
import yaml

from moeca_dist import Engine
from moeca_dist.calibration.file import read_calibration
from moeca_dist.cli import main, tune_main
from moeca_dist.config import QUALITY_NAMES, load_config
from tests.cli.test_commands import refuse
from tests.helpers.golden_files import load_golden

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = str(CONFIGS / "demo.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run.yaml`` with a small latent DSMoE that nobody has tuned."""
    folder = tmp_path_factory.mktemp("quality")
    golden = load_golden("dsmoe_e8")
    golden.write_checkpoint(folder / "model.pt")
    section = {"checkpoint": "model.pt", "device": "cpu", **golden.options}
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": section, "sampling": {"num_steps": 8}}))
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moeca_dist.tuning.trials.GENERATIONS", 1)
    monkeypatch.setattr("moeca_dist.tuning.choose.LADDER", (0.3,))


def generate(config: str, out: Path, *options: str) -> dict:
    assert main(["generate", "--config", config, "--out", str(out), "--num-images", "2", *options]) == 0
    return json.loads((out / "report.json").read_text())


# ---- tuned files -----------------------------------------------------------------------------------------------------


def test_the_demo_is_the_balanced_file_and_faster_files_are_less_exact() -> None:
    demo = load_config(DEMO)
    assert demo.cache == load_config(demo.quality.balanced).cache
    figures = []
    for name in QUALITY_NAMES:
        calibration = load_config(getattr(demo.quality, name)).cache.calibration
        figures.append(read_calibration(calibration).fitted_on["after"])
    assert figures[0]["mean_db"] < figures[1]["mean_db"] < figures[2]["mean_db"]
    assert figures[0]["speedup"] > figures[1]["speedup"] > figures[2]["speedup"]
    assert figures[0]["mean_db"] >= 45 and figures[1]["speedup"] >= 4.3


@pytest.mark.parametrize("name", QUALITY_NAMES)
def test_tuned_files_load_with_their_calibration(name: str) -> None:
    engine = Engine.from_config(CONFIGS / "tuned" / f"demo_{name}.yaml")
    assert engine.calibration is not None


def test_quality_takes_the_cache_of_the_tuned_file(tmp_path: Path) -> None:
    report = generate(DEMO, tmp_path / "out", "--quality", "draft")
    draft = load_config(CONFIGS / "tuned" / "demo_draft.yaml")
    saved = load_config(tmp_path / "out" / "config.yaml")
    assert saved.cache == draft.cache and report["flops"]["speedup"] > 6


def test_a_target_takes_the_fastest_file_that_meets_it(tmp_path: Path) -> None:
    bounds = {}
    for name in ("draft", "balanced"):
        calibration = load_config(CONFIGS / "tuned" / f"demo_{name}.yaml").cache.calibration
        assert calibration is not None
        bounds[name] = read_calibration(calibration).fitted_on["after"]["bound_db"]
    between = (bounds["draft"] + bounds["balanced"]) / 2
    for target, name in ((bounds["draft"] - 0.1, "draft"), (between, "balanced")):
        generate(DEMO, tmp_path / name, "--target-psnr", str(target))
        tuned = load_config(CONFIGS / "tuned" / f"demo_{name}.yaml")
        assert load_config(tmp_path / name / "config.yaml").cache == tuned.cache


def test_targets_and_qualities_that_cannot_be_had(capsys, tmp_path: Path) -> None:
    argv = ["generate", "--config", DEMO, "--out", str(tmp_path / "out")]
    text = refuse(capsys, [*argv, "--target-psnr", "150"])
    assert "of the tuned files faithful comes closest, with" in text and "x fewer FLOPs" in text
    text = refuse(capsys, [*argv, "--quality", "draft", "--set", "cache.policy=fora"])
    assert text.startswith("--set cache.policy=fora has no effect with --quality")
    assert "not allowed with" in refuse(capsys, [*argv, "--quality", "draft", "--target-psnr", "40"])
    assert "'nan' is not a number of decibels above 0" in refuse(capsys, [*argv, "--target-psnr", "nan"])
    text = refuse(capsys, [*argv, "--quality", "draft", "--set", "sampling.num_steps=20"])
    assert "cache.full_steps names" in text or "was fitted for sampling.num_steps 50, not 20" in text
    assert not (tmp_path / "out").exists()


# ---- models that nobody has tuned ------------------------------------------------------------------------------------


def test_an_untuned_model_is_calibrated_first_and_its_run_can_be_repeated(folder: Path, tmp_path: Path) -> None:
    import numpy as np

    config = str(folder / "run.yaml")
    report = generate(config, tmp_path / "draft", "--quality", "draft", "--compare-uncached")
    faithful = generate(config, tmp_path / "faithful", "--quality", "faithful")
    assert report["flops"]["speedup"] > faithful["flops"]["speedup"] > 1.5
    saved = load_config(tmp_path / "draft" / "config.yaml")
    assert saved.cache.policy == "network_forecast"
    if saved.cache.calibration is not None:
        assert saved.cache.calibration == tmp_path / "draft" / "calibration.json"
    generate(str(tmp_path / "draft" / "config.yaml"), tmp_path / "again")
    first, second = (np.load(tmp_path / name / "latents.npz")["arr_0"] for name in ("draft", "again"))
    assert np.array_equal(first, second)


def test_decibels_mean_nothing_for_latents(folder: Path, capsys, tmp_path: Path) -> None:
    argv = ["generate", "--config", str(folder / "run.yaml"), "--out", str(tmp_path / "out"), "--target-psnr", "40"]
    assert "this model generates latents: give --quality" in refuse(capsys, argv)
    assert list(tmp_path.iterdir()) == []


# ---- the tune command ------------------------------------------------------------------------------------------------


def test_tune_writes_a_config_that_reproduces_the_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.yaml"
    argv = ["--config", str(folder / "run.yaml"), "--out", str(out), "--target-speedup", "2", "--num-images", "2"]
    argv += ["--set", f"quality.draft={folder / 'draft.yaml'}"]
    assert tune_main([*argv, "--refinements", "1"]) == 0
    assert ": /" not in out.read_text(), "paths are relative, so that the files can move together"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tuned.yaml", "tuned.calibration.json", "tuned.md", "tuned.png"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("tuned.yaml", "tuned.calibration.json"):
        (tmp_path / name).rename(moved / name)
    (moved / "tuned.yaml").write_text(
        (moved / "tuned.yaml").read_text().replace("checkpoint: ", f"checkpoint: {tmp_path}/")
    )
    report = generate(str(moved / "tuned.yaml"), tmp_path / "run")
    measured = read_calibration(moved / "tuned.calibration.json").fitted_on["after"]
    assert report["flops"]["speedup"] == pytest.approx(measured["speedup"], rel=0.05)
    page = (tmp_path / "tuned.md").read_text()
    assert "# Tuned for 2x fewer FLOPs" in page and "(chosen)" in page and "| uniform |" in page


def test_tune_refuses(folder: Path, capsys, tmp_path: Path) -> None:
    config, out = str(folder / "run.yaml"), tmp_path / "tuned.yaml"
    argv = ["tune", "--config", config, "--out", str(out)]
    assert "one of the arguments --target-psnr --target-speedup is required" in refuse(capsys, argv)
    assert "is not a ratio above 1" in refuse(capsys, [*argv, "--target-speedup", "1"])
    assert "give at least 2" in refuse(capsys, [*argv, "--target-speedup", "2", "--num-images", "1"])
    assert "give --target-speedup" in refuse(capsys, [*argv, "--target-psnr", "40"])
    missing = str(tmp_path / "no" / "tuned.yaml")
    assert "there is no folder" in refuse(capsys, [*argv[:-1], missing, "--target-speedup", "2"])
    assert "name a .yaml file" in refuse(capsys, [*argv[:-1], str(tmp_path / "tuned"), "--target-speedup", "2"])
    out.write_text("")
    assert "exists already" in refuse(capsys, [*argv, "--target-speedup", "2"])
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.yaml"}

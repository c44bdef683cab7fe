"""Mistakes in a batch's arguments are refused in one line before any cluster is started."""

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moeca_dist.cli import main
from moeca_dist.config import load_config
from moeca_dist.demo.model_card import SHIPPED_CHECKPOINT
from moeca_dist.ray_batch.identity import batch_identity
from moeca_dist.ray_batch.jobs import LabelCycle
from moeca_dist.ray_batch.manifest import VERSION, Manifest
from moeca_dist.runtime.run_plan import RunPlan

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the arguments are refused with."""
    assert main(["batch", "--config", str(DEMO), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A batch of ten images by gangs of two, of which nothing is done yet."""
    config = RunPlan.resolve(load_config(DEMO), 2).config
    identity = batch_identity(config, LabelCycle(10, [range(10)], 0), 10, 2, "cpu")
    manifest = Manifest(tmp_path, 0)
    manifest.append("job", version=VERSION, identity=identity)
    manifest.close()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gang-size", "3", "--set", "parallel.ep_size=2"], "ep_size 2 does not divide the world size 3"),
        (["--jobs", "jobs.csv", "--seed", "1"], "--seed has no effect with --jobs"),
        (["--jobs", "jobs.csv"], "cannot read the jobs file"),
        (["--bundles", "2,2", "--gang-size", "3"], "--bundles 2,2 is 4 ranks, --gang-size 3"),
        (["--address", "10.0.0.1:6379", "--dashboard"], "--dashboard has no effect"),
        (["--progress-timeout", "0"], "'0' is not a number of seconds above 0"),
        (["--labels", "3,10"], "label 10 is out of range"),
        (["--address", "local", "--gangs", "1000"], "1000 gangs of 1 are 1000 ranks, but this machine has"),
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], problem: str) -> None:
    assert problem in refused(capsys, "--out", str(tmp_path / "out"), *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--seed", "1"], "requests.seed was 0 and is now 1"),
        (["--num-images", "11"], "requests.num_images was 10 and is now 11"),
        (["--labels", "3"], "requests.labels was 0-9 and is now 3"),
        (["--set", "sampling.num_steps=7"], "sampling.num_steps was 50 and is now 7"),
        (["--gang-size", "1"], "gang_size was 2 and is now 1"),
    ],
)
def test_another_batch_is_not_resumed(
    capsys: pytest.CaptureFixture[str], begun: Path, arguments: list[str], problem: str
) -> None:
    common = ["--out", str(begun), "--resume", "--address", "local", "--gang-size", "2", "--num-images", "10"]
    assert problem in refused(capsys, *common, *arguments)


def test_another_model_is_not_resumed(capsys: pytest.CaptureFixture[str], begun: Path, tmp_path: Path) -> None:
    tensors = load_file(SHIPPED_CHECKPOINT)
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] + 1e-3
    with safe_open(SHIPPED_CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    common = ["--out", str(begun), "--resume", "--address", "local", "--gang-size", "2", "--num-images", "10"]
    assert "model.sha256 was" in refused(capsys, *common, "--set", f"model.checkpoint={tmp_path / 'other.safetensors'}")


def test_folders(capsys: pytest.CaptureFixture[str], begun: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert "go on with it with --resume" in refused(capsys, "--out", str(begun))
    other = tmp_path_factory.mktemp("other")
    (other / "thesis.tex").touch()
    assert "is not empty and holds no batch" in refused(capsys, "--out", str(other), "--resume")

"""The output folder: complete or absent."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moeca_dist.config import Config, load_config
from moeca_dist.errors import UserError
from moeca_dist.report.schema import BranchReport, CacheReport, ExchangeReport, FlopsReport, Report
from moeca_dist.runtime.output_folder import OutputFolder
from moeca_dist.timing import Seconds
from moeca_dist.types import Request

REPORT = Report(
    num_images=5,
    world_size=1,
    ep_size=1,
    dp_size=1,
    num_steps=2,
    wall_s=1.5,
    denoise_s=1.0,
    images_per_s=3.3,
    flops=FlopsReport(10**12, 10**12, 1.0),
    branches=BranchReport(8, 8, 0, 0, 0, 0.0),
    exchange=ExchangeReport("exact", None, 3 * 2**20, 3 * 2**20, 4, 0),
    cache=CacheReport("none", 0),
    seconds=Seconds({"experts": 1.5}, {"experts": 1.5}, {"experts": [1.5]}),
)


def pictures(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, channels), dtype=np.uint8)


def requests(first: int, count: int) -> list[Request]:
    return [Request(first + offset, 0) for offset in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_is_there_at_the_end_and_nothing_before(tmp_path: Path, channels: int) -> None:
    out, samples = tmp_path / "deep" / "out", pictures(5, channels)
    folder = OutputFolder(out, 5)
    folder.add(requests(0, 3), samples[:3])
    folder.add(requests(3, 2), samples[3:])
    assert not out.exists()
    folder.finish(Config(), REPORT)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "grid.png",
        "images",
        "report.json",
        "samples.npz",
    ]
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"], samples)
    stored = [
        np.asarray(Image.open(out / "images" / f"{index:06d}.png")).reshape(16, 16, channels) for index in range(5)
    ]
    assert np.array_equal(np.stack(stored), samples)
    assert Image.open(out / "grid.png").size == (5 * 64, 64)
    assert load_config(out / "config.yaml") == Config()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_latents_are_saved_as_they_are(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    folder = OutputFolder(tmp_path / "out", 2)
    folder.add(requests(0, 2), latents)
    folder.finish(Config(), REPORT)
    assert np.array_equal(np.load(tmp_path / "out" / "latents.npz")["arr_0"], latents)
    assert not (tmp_path / "out" / "images").exists() and not (tmp_path / "out" / "grid.png").exists()


def test_an_abandoned_run_leaves_nothing(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", 5)
    folder.add(requests(0, 3), pictures(3))
    folder.abandon()
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for count in (5, 2):
        folder = OutputFolder(out, count, overwrite=True)
        folder.add(requests(0, count), pictures(count))
        folder.finish(Config(), REPORT)
    assert len(list((out / "images").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_run_survives_a_failed_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = OutputFolder(out, 5)
    folder.add(requests(0, 5), pictures(5))
    folder.finish(Config(), REPORT)
    failed = OutputFolder(out, 5, overwrite=True)
    failed.add(requests(0, 1), pictures(1))
    failed.abandon()
    assert len(list((out / "images").iterdir())) == 5


def test_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "out", 5).add(requests(0, 5), pictures(5))
    folder = OutputFolder(tmp_path / "out", 1)
    folder.add(requests(0, 1), pictures(1))
    folder.finish(Config(), REPORT)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1


def test_refused_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        OutputFolder(tmp_path / "file", 1)
    with pytest.raises(UserError, match="cannot write to"):
        OutputFolder(tmp_path / "file" / "below", 1)
    with pytest.raises(UserError, match=r"is not empty: .*--overwrite"):
        OutputFolder(tmp_path, 1)
    with pytest.raises(UserError, match="something else than an earlier run"):
        OutputFolder(tmp_path, 1, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_summary_is_readable() -> None:
    summary = REPORT.summary()
    assert "5 in 2 steps" in summary and "1.00 TFLOP" in summary and "3.00 MiB in 4 collectives" in summary

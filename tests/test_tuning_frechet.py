"""``moeca tune --max-fid-rise``: the rise against an independent figure, the choice, and what is refused.

Shape suffixes: N images, F features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from moeca_dist import Engine, UserError
from moeca_dist.cli import main
from moeca_dist.config import load_config
from moeca_dist.demo.data import real_digits
from moeca_dist.demo.judge import features
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.tuning.candidate import Candidate
from moeca_dist.tuning.frechet import Against, FrechetTest, Reference, Rise
from moeca_dist.tuning.schedules import num_full
from moeca_dist.tuning.state import StateFile
from moeca_dist.tuning.target import Target
from moeca_dist.tuning.tune import Settings, Tuned, run_identity, tune
from moeca_dist.types import Request
from tests.test_cli import refuse

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
NUM_STEPS, IMAGES = 6, 80
DIGITS = Against(Path("real-digits"), "digits", IMAGES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moeca_dist.tuning.laboratory.GENERATIONS", 2)
    monkeypatch.setattr("moeca_dist.tuning.choose.LADDER", (0.3,))
    monkeypatch.setattr("moeca_dist.tuning.choose.ORDERS", (("network_forecast", (1,)),))
    monkeypatch.setattr("moeca_dist.tuning.frechet.RESAMPLES", 20)


def demo() -> Engine:
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    settings = ["cache={policy: none}", f"sampling.num_steps={NUM_STEPS}"]
    return Engine.from_config(load_config(DEMO, settings), mesh=mesh)


def settings(value: float, against: Against = DIGITS) -> Settings:
    return Settings(Target("fid_rise", value), num_images=4, seed=7, refinements=1, against=against)


def distance(images_NHWC: np.ndarray) -> float:
    """To the real digits, by the formula: a matrix square root of the product of covariances."""
    made, real = (features(each).astype(np.float64) for each in (images_NHWC, real_digits()))
    covariances = [np.cov(each, rowvar=False) for each in (made, real)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    apart = made.mean(0) - real.mean(0)
    return float(apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root.real))


def measured(engine: Engine, value: float, state: StateFile | None = None) -> Tuned:
    return tune(engine, settings(value), state)


@pytest.fixture(scope="module")
def allowed() -> float:
    """Half of the rise that the fewest full steps bring."""
    engine = demo()
    cache = Candidate("network_forecast", 1, ((0,), (0,))).cache()
    test = FrechetTest(engine.without_cache(), Reference.open(engine, DIGITS), 8)
    return test.rise(engine.with_cache(cache)).value / 2


def test_the_fastest_that_stays_close_is_chosen_and_its_rise_is_the_formulas(allowed: float, tmp_path: Path) -> None:
    engine = demo()
    state = StateFile(tmp_path / "tuned.state", run_identity(engine, settings(allowed)))
    tuned = measured(engine, allowed, state)
    assert tuned.rises is not None and tuned.rises.checked.high <= allowed
    assert 2 < num_full(tuned.chosen.candidate.schedule) < 2 * NUM_STEPS and tuned.chosen.speedup > 1
    wanted = [Request(index, index % 10, 9) for index in range(IMAGES)]
    cached = engine.with_cache(tuned.chosen.candidate.cache(), tuned.calibration)
    (images, _), (exact, _) = cached.generate(wanted), engine.without_cache().generate(wanted)
    rise = tuned.rises.held_out
    assert rise.cached == pytest.approx(distance(np.asarray(images)), rel=1e-4)
    assert rise.uncached == pytest.approx(distance(np.asarray(exact)), rel=1e-4)
    assert rise.low < rise.value < rise.high
    # What is known is not asked again: another run of the same settings measures the held-out images alone.
    known = len(state.records)
    assert known == 0
    state.close()
    again = StateFile(tmp_path / "tuned.state", run_identity(engine, settings(allowed)))
    known = len(again.records)
    assert sum("rise" in record for record in again.records) >= 2
    assert measured(engine, allowed, again) == tuned
    again.close()
    assert len((tmp_path / "tuned.state").read_text().splitlines()) == known + 1


def rise_on_rank(cache: Any) -> Rise:
    engine = demo()
    return FrechetTest(engine.without_cache(), Reference.open(engine, DIGITS), 8).rise(engine.with_cache(cache))


def test_two_ranks_find_the_rise_of_one(two_ranks: Any) -> None:
    cache = Candidate("network_forecast", 1, ((0, 2, 4), (0, 3))).cache()
    alone = rise_on_rank(cache)
    first, second = two_ranks.run(rise_on_rank, cache)
    assert first == second
    # Pixels are rounded to grey levels, and a few fall to the other side.
    assert first.value == pytest.approx(alone.value, abs=1e-3)


def test_an_unreachable_target_names_the_least_rise_and_its_cost() -> None:
    with pytest.raises(UserError, match=r"no cache reaches .* 1e-09 above .*: the least rise found is .* at .*x fewer"):
        measured(demo(), 1e-9)


@pytest.mark.parametrize(
    ("against", "problem"),
    [
        (
            Against(Path("real-digits"), "digits", 64),
            "--fid-images 64: the covariance of 64 features takes at least 65",
        ),
        (Against(Path("few.npz"), "digits"), "few.npz has 64 images"),
        (Against(Path("large.npz"), "digits"), "this model makes 16 x 16 x 1, .*8 x 8 x 1"),
        (Against(Path("nowhere.npz"), "digits"), "nowhere.npz does not exist"),
        (Against(Path("real-digits"), "inception.pt"), "inception.pt"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(
    against: Against, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "few.npz", arr_0=real_digits()[:64])
    np.savez(tmp_path / "large.npz", arr_0=real_digits()[:, :8, :8])
    monkeypatch.chdir(tmp_path)
    engine = demo()
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("sampling began"))
    with pytest.raises(UserError, match=problem):
        tune(engine, settings(0.1, against))


def test_the_command_refuses_options_that_do_not_go_together(capsys: Any, tmp_path: Path) -> None:
    argv = ["tune", "--config", str(DEMO), "--out", str(tmp_path / "tuned.yaml")]
    asked = [*argv, "--max-fid-rise", "0.1"]
    assert "--max-fid-rise needs --reference" in refuse(capsys, asked)
    assert "--max-fid-rise needs --features" in refuse(capsys, [*asked, "--reference", "real-digits"])
    assert "is not a number above 0" in refuse(capsys, [*argv, "--max-fid-rise", "0"])
    stray = [*argv, "--target-speedup", "2", "--fid-images", "100"]
    assert "--fid-images has no effect without --max-fid-rise" in refuse(capsys, stray)


def test_the_command_writes_the_rise_into_its_page(tmp_path: Path, allowed: float) -> None:
    argv = ["tune", "--config", str(DEMO), "--out", str(tmp_path / "tuned.yaml"), "--num-images", "4"]
    argv += ["--set", "cache={policy: none}", "--set", f"sampling.num_steps={NUM_STEPS}", "--refinements", "0"]
    argv += ["--max-fid-rise", f"{2 * allowed}", "--reference", "real-digits", "--features", "digits"]
    assert main([*argv, "--fid-images", str(IMAGES)]) == 0
    page = (tmp_path / "tuned.md").read_text()
    assert "rise (95% interval)" in page and f"{IMAGES} images of seed" in page and "| **held out** | 9 |" in page

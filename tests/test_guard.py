"""The guard: ranges of forecast errors, what is added where they are left, and what becomes of the images.

Shape suffixes: B images.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeca_dist.cache.guard import Guard
from moeca_dist.cache.policies import build_policy
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.calibrate import calibrate
from moeca_dist.checks import check_config
from moeca_dist.cli import main
from moeca_dist.config import CacheConfig, Config, load_config
from moeca_dist.engine import Engine
from moeca_dist.errors import UserError
from moeca_dist.memory import cache_size
from moeca_dist.models.flops import forward_flops
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.quality import psnr_db, squared_error, unit_images
from moeca_dist.report import Report
from moeca_dist.report_view import render
from moeca_dist.sampling.calibration import Calibration, read_calibration
from moeca_dist.sampling.ranges import MIN_IMAGES, SPREADS, ErrorRanges
from moeca_dist.types import Request, StepContext

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
STEPS = 16
# Factor on all parameters of the blocks: a network that the calibration was not made for.
OTHER = 1.6
APART = {"conditional": [0, 2, 5, 8, 11, 14], "unconditional": [0, 4, 8, 12]}


def requests(count: int, seed: int = 3) -> list[Request]:
    return [Request(index, index % 10, seed) for index in range(count)]


def step(index: int) -> StepContext:
    return StepContext(index, STEPS, 0.0)


# ---- what is added ---------------------------------------------------------------------------------------------------


def make_guard(statistics: CacheStatistics, images: int = 3, order: int = 1) -> Guard:
    config = CacheConfig(policy="network_forecast", full_steps=[0, 4, 8, 13], order=order)
    policy = build_policy(config, STEPS, guided=False)
    assert policy is not None
    return Guard(policy, {"conditional": {4: 0.125, 8: 0.25, 13: 0.125}}, STEPS, images, statistics)


def added(guard: Guard, steps: range) -> list[Any]:
    return [guard.added(step(index), "conditional") for index in steps]


def test_gaps_are_divided_as_an_adaptive_solver_divides_them() -> None:
    """Order 1: four times the limit takes two pieces, a little more three; the gap 4-8 holds no more than four."""
    statistics = CacheStatistics()
    guard = make_guard(statistics, 5)
    guard.full_step(step(4), {"conditional": torch.tensor([0.125, 0.5, 0.51, 9.0, math.nan])})
    assert added(guard, range(4, 9)) == [None, [2, 3, 4], [1, 3, 4], [2, 3, 4], None]
    assert [guard.off_schedule(step(index)) for index in (4, 5, 6)] == [[], [2, 3, 4], [1, 2, 3, 4]]
    # At 8 the forecasts of images 1 to 4 reached over 2, 1, 1 and 1 of 4 steps: judged is what 4 would have given.
    guard.full_step(step(8), {"conditional": torch.tensor([0.25, 0.0625, 0.015625, 0.0001, 0.19])})
    assert [guard.off_schedule(step(index)) for index in (8, 9, 12)] == [[1, 2, 3, 4], [4], [4]]
    assert added(guard, range(9, 14)) == [[4], [4], None, [4], None]
    guard.full_step(step(13), {"conditional": torch.tensor([0.0, 0.0, 0.125, 0.126, 0.0])})
    assert added(guard, range(14, 16)) == [None, [3]]
    assert statistics.guard_measured == 15 and statistics.guard_images == 4
    assert statistics.guard_fired.total() == 5 and statistics.guard_added.total() == 9 + 3 + 1


@pytest.mark.parametrize(("order", "pieces"), [(0, 4), (1, 2), (3, 2)])
def test_pieces_follow_from_the_order(order: int, pieces: int) -> None:
    guard = make_guard(CacheStatistics(), 1, order)
    guard.full_step(step(4), {"conditional": torch.tensor([0.5])})
    assert added(guard, range(5, 8)).count([0]) == pieces - 1


def test_a_rank_takes_part_in_what_others_add() -> None:
    guard = make_guard(CacheStatistics())
    guard._agree = lambda counts_C: counts_C + torch.tensor([0, 1, 0])
    guard.full_step(step(4), {"conditional": torch.zeros(3)})
    assert added(guard, range(5, 8)) == [None, [], None]


def test_limits_are_spreads_above_the_mean_of_the_logarithms() -> None:
    draw = torch.Generator().manual_seed(0)
    wide, narrow = (torch.randn(2000, generator=draw) * spread for spread in (0.2, 0.1))
    ranges = ErrorRanges.of({("conditional", 4): (wide - 2).exp(), ("conditional", 8): (narrow - 1).exp()})
    assert ranges is not None
    pooled = math.sqrt((0.2**2 + 0.1**2) / 2)
    assert math.log(ranges.limits["conditional"][4]) == pytest.approx(-2 + SPREADS * 0.2, abs=0.03)
    assert math.log(ranges.limits["conditional"][8]) == pytest.approx(-1 + SPREADS * pooled, abs=0.03)
    assert ErrorRanges.from_json(json.loads(json.dumps(vars(ranges)))) == ranges
    assert ErrorRanges.of({("conditional", 4): torch.ones(MIN_IMAGES - 1)}) is None and ErrorRanges.of({}) is None


# ---- the demo --------------------------------------------------------------------------------------------------------


def demo_config(cfg_scale: float = 1.5, **cache: Any) -> Config:
    config = load_config(DEMO, ["cache={policy: none}"])
    sampling = config.sampling.model_copy(update={"num_steps": STEPS, "cfg_scale": cfg_scale})
    section = CacheConfig.model_validate({"policy": "network_forecast", "full_steps": APART, **cache})
    return config.model_copy(update={"cache": section, "sampling": sampling})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(Engine.from_config(demo_config()), requests(20, 7), requests(20, 8)).calibration


def with_cache(calibration: Calibration, scale: float = 1.0, **cache: Any) -> Engine:
    """The demo with the parameters of its blocks scaled."""
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    bare = Engine.from_config(demo_config(), mesh=mesh)
    engine = Engine(demo_config(**cache), mesh, bare.model, calibration=calibration)
    with torch.no_grad():
        for parameter in engine.model.blocks.parameters():
            parameter.mul_(scale)
    return engine


def run(engine: Engine, wanted: list[Request]) -> tuple[np.ndarray, Report]:
    images, report = engine.generate(wanted)
    return np.asarray(images), report


def guarded_demo(
    calibration: Calibration, scale: float, count: int, *, guard: bool = True
) -> tuple[np.ndarray, Report]:
    """Runs on every rank of a pool, or alone."""
    return run(with_cache(calibration, scale, guard=guard), requests(count))


def closeness_db(images: np.ndarray, exact: np.ndarray) -> float:
    return float(psnr_db(squared_error(unit_images(images), unit_images(exact))).mean())


def test_it_never_fires_on_images_like_those_of_the_calibration(calibration: Calibration) -> None:
    """And then the images are those without it, to the last bit."""
    images, report = guarded_demo(calibration, 1.0, 16)
    plain, without = guarded_demo(calibration, 1.0, 16, guard=False)
    guard = report.cache.guard
    assert guard is not None and guard["measured"] == 16 * (5 + 3) and guard["out_of_range"] == guard["added"] == 0
    assert np.array_equal(images, plain) and report.flops == without.flops and without.cache.guard is None
    assert report.cache.bytes_peak == without.cache.bytes_peak


@pytest.fixture(scope="module")
def other_network(calibration: Calibration) -> tuple[np.ndarray, Report]:
    return guarded_demo(calibration, OTHER, 4)


def test_it_fires_on_another_network_and_brings_images_closer(calibration: Calibration, other_network: Any) -> None:
    images, report = other_network
    engine = with_cache(calibration, OTHER)
    exact, _ = run(engine.without_cache(), requests(4))
    plain, _ = run(engine, requests(4))
    assert report.cache.guard["added"] > 4
    assert closeness_db(images, exact) > closeness_db(plain, exact) + 3


def test_flops_and_branches_count_what_was_added(other_network: Any) -> None:
    _, report = other_network
    spec = Engine.from_config(demo_config()).model.spec
    per_image = forward_flops(spec)
    full = 4 * sum(map(len, APART.values())) + report.cache.guard["added"]
    assert report.flops.computed == 4 * 2 * STEPS * (per_image.total - per_image.blocks) + full * per_image.blocks
    assert report.branches.refreshed == full * len(spec.moe_blocks) * spec.num_tokens * spec.num_experts_per_tok


def test_memory_is_what_rows_of_their_own_take_more(calibration: Calibration, other_network: Any) -> None:
    _, report = other_network
    config = demo_config(guard=True)
    spec = Engine.from_config(demo_config()).model.spec
    plain, guarded = (cache_size(demo_config(guard=guard), spec, STEPS, 1, calibration) for guard in (False, True))
    assert plain is not None and guarded is not None and config.cache.guard
    assert plain.of(4) < report.cache.bytes_peak <= guarded.of(4) == plain.of(4) + 2 * 4 * spec.num_tokens * 4


def test_the_report_says_where(other_network: Any) -> None:
    _, report = other_network
    guard = report.cache.guard
    for half, by_step in guard["by_step"].items():
        assert set(by_step["out_of_range"]) <= {str(index) for index in APART[half][1:]}
        assert not {int(index) for index in by_step["added"]} & set(APART[half])
    assert sum(sum(by_step["added"].values()) for by_step in guard["by_step"].values()) == guard["added"]
    text = render(json.loads(report.to_json()))
    assert "added, conditional" in text and f"{guard['added']} evaluations added" in text
    assert f"{guard['added']} evaluations added" in report.summary()


def test_images_depend_neither_on_their_batch_nor_on_the_ranks(
    calibration: Calibration, other_network: Any, two_ranks: Any
) -> None:
    """Alone, one by one, and on two ranks: the same evaluations of every image."""
    images, report = other_network
    config = demo_config(guard=True)
    single = config.model_copy(update={"sampling": config.sampling.model_copy(update={"batch_size": 1})})
    engine = with_cache(calibration, OTHER)
    one_by_one, of_singles = run(Engine(single, engine.mesh, engine.model, calibration=calibration), requests(4))
    (ranks, of_ranks), (_, second) = two_ranks.run(guarded_demo, calibration, OTHER, 4)
    assert of_ranks.cache.guard == second.cache.guard == of_singles.cache.guard == report.cache.guard
    for others in (one_by_one, ranks):
        assert np.abs(others.astype(int) - images.astype(int)).max() <= 1
    # One gathering in every full step that something follows, besides those of the layers; nobody waits for another.
    assert of_ranks.exchange.agreements == second.exchange.agreements


def test_a_rank_without_images_takes_part(calibration: Calibration, two_ranks: Any) -> None:
    alone, report = guarded_demo(calibration, OTHER, 1)
    (ranks, of_ranks), _ = two_ranks.run(guarded_demo, calibration, OTHER, 1)
    assert report.cache.guard == of_ranks.cache.guard and report.cache.guard["added"]
    assert np.abs(alone.astype(int) - ranks.astype(int)).max() <= 1


# ---- the file and what is refused ------------------------------------------------------------------------------------


def test_ranges_are_added_to_a_file_and_weights_stay(
    calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(replace(calibration, ranges=None).to_json())
    assert read_calibration(old).ranges is None
    (tmp_path / "run.yaml").write_text(demo_config(calibration=old).to_yaml())
    command = ["calibrate", "--config", str(tmp_path / "run.yaml"), "--keep-weights", "--num-images", "20"]
    assert main([*command, "--out", str(new)]) == 0
    added = read_calibration(new)
    assert added.weights == calibration.weights and added.fitted_on == calibration.fitted_on
    assert added.ranges == calibration.ranges  # of the same images
    assert main([*command[:-1], "7", "--out", str(tmp_path / "few.json")]) == 2
    assert "at least 8 images" in capsys.readouterr().err and not (tmp_path / "few.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda ranges: ranges["limits"]["conditional"].pop("8"),
        lambda ranges: ranges["limits"].pop("unconditional"),
        lambda ranges: ranges["limits"]["conditional"].update({"8": -1.0}),
        lambda ranges: ranges.pop("typical"),
    ],
)
def test_damaged_ranges_are_refused(calibration: Calibration, tmp_path: Path, damage: Any) -> None:
    tree = json.loads(calibration.to_json())
    damage(tree["ranges"])
    (tmp_path / "bad.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is no calibration"):
        read_calibration(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("cache", "problem"),
    [
        ({"policy": "none"}, "cache.guard has no effect with cache.policy none"),
        ({"policy": "taylorseer"}, "which policy taylorseer does not make"),
        ({"policy": "teacache"}, "which policy teacache does not make"),
        ({"policy": "network_forecast"}, "has no effect without cache.calibration"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(cache: dict[str, Any], problem: str) -> None:
    config = demo_config().model_copy(update={"cache": CacheConfig.model_validate({**cache, "guard": True})})
    with pytest.raises(UserError, match=problem):
        check_config(config, [])
    with pytest.raises(UserError, match=problem):
        Engine.from_config(config)


def test_without_ranges_or_gaps_it_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(replace(calibration, ranges=None).to_json())
    with pytest.raises(UserError, match=r"has no ranges of forecast errors: .* moeca calibrate --keep-weights"):
        check_config(demo_config(guard=True, calibration=tmp_path / "old.json"), [])
    with pytest.raises(UserError, match="no full step but the first is followed by one that is served"):
        with_cache(calibration, guard=True, full_steps=list(range(STEPS)))


def test_switching_it_on_keeps_the_files_calibration() -> None:
    config = load_config(DEMO, ["cache.guard=true"])
    assert config.cache.guard and config.cache.calibration is not None and config.cache.full_steps is not None


def test_shipped_calibrations_have_ranges() -> None:
    for name in ("draft", "balanced"):
        check_config(load_config(DEMO.parent / "tuned" / f"demo_{name}.yaml", ["cache.guard=true"]), [])

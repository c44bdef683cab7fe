"""Calibrated output weights: terms, fit, file, and what they do to images.

Shape suffixes: B images, C channels, H and W pixels, N pixels of all images, K terms.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeca_dist.calibration.correction import Corrected, OutputMemory, OutputWeights, num_terms
from moeca_dist.calibration.file import Calibration
from moeca_dist.calibration.fit import least_squares
from moeca_dist.cli import main
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.runtime.engine import Engine
from moeca_dist.sampling import ddpm
from moeca_dist.sampling.guidance import Guidance
from moeca_dist.tuning.calibrate import Outcome, calibrate
from moeca_dist.types import Request, StepContext
from tests.helpers.golden_files import load_golden

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
STEPS = 12
FULL = {"conditional": [0, 3, 6, 9], "unconditional": [0, 5]}


def image(value: float) -> Tensor:
    return torch.full((2, 3, 4, 4), value)


def is_full(step: StepContext, half: str) -> bool:
    return step.index in FULL[half]


def step(index: int) -> StepContext:
    return StepContext(index, STEPS, index / STEPS)


def test_terms_are_the_outputs_that_the_definition_names() -> None:
    """Output at step i of half h is i + 100 h; every term is checked against a list of what was computed and served."""
    memory = OutputMemory(is_full, history=2)
    for index in range(STEPS):
        found = memory.terms([image(index), image(100 + index)], image(-index), step(index))
        expected: list[float | None] = []
        for half, offset in (("conditional", 0), ("unconditional", 100)):
            past = [offset + full for full in FULL[half] if full < index][::-1][:2]
            served = [
                offset + i for i in range(index) if i > max(f for f in FULL[half] if f <= i) and i > past[0] - offset
            ]
            expected += [offset + index, *past, *[None] * (2 - len(past))]
            expected.append(sum(served) if index in FULL[half] and served else None)
        expected.append(-index)
        assert len(found) == num_terms(2, 2) == len(expected)
        assert [None if term is None else term.flatten()[0].item() for term in found] == expected


def test_zero_weights_are_plain_guidance_to_the_last_bit() -> None:
    guidance = Guidance(1.5)
    weights = OutputWeights(2, ((0.0,) * num_terms(2, 2),) * STEPS)
    corrected = Corrected(guidance, weights, OutputMemory(is_full, 2))
    draw = torch.Generator().manual_seed(0)
    for index in range(STEPS):
        halves = torch.randn(2, 2, 3, 4, 4, generator=draw).unbind()
        assert torch.equal(corrected(halves, halves[0], step(index)), guidance(halves, halves[0], step(index)))


def test_least_squares_finds_what_made_the_residual_and_agrees_with_numpy() -> None:
    draw = torch.Generator().manual_seed(1)
    terms = [torch.randn(3, 2, 4, 4, generator=draw) for _ in range(4)]
    residual = 0.5 * terms[0] - 0.2 * terms[3] + 0.1 * torch.randn(3, 2, 4, 4, generator=draw)
    found = least_squares([terms[0], None, *terms[1:]], residual, lambda part: part)
    columns_NK = np.stack([term.flatten().double().numpy() for term in terms], axis=1)
    expected, *_ = np.linalg.lstsq(columns_NK, residual.flatten().double().numpy(), rcond=None)
    assert found[1] == 0
    np.testing.assert_allclose([found[0], *found[2:]], expected, rtol=1e-4, atol=1e-6)


def test_least_squares_without_images_has_no_weights() -> None:
    empty = torch.empty(0, 2, 4, 4)
    assert least_squares([empty, None, empty], empty, lambda part: part) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("index", [0, 3, 9])
def test_ddpm_gain_is_that_of_the_posterior(index: int) -> None:
    """a and b measured by moving state and noise prediction one at a time."""
    diffusion, entry = ddpm.RespacedDiffusion.of(10), 9 - index
    draw = torch.Generator().manual_seed(2)
    state, output = torch.randn(1, 4, 2, 2, generator=draw), torch.randn(1, 8, 2, 2, generator=draw)
    mean, _ = diffusion.posterior(output, state, entry)
    by_state = (diffusion.posterior(output, state + 1, entry)[0] - mean).mean()
    moved = output.clone()
    moved[:, :4] += 1
    by_output = (diffusion.posterior(moved, state, entry)[0] - mean).mean()
    assert ddpm.gains(index, 10) == pytest.approx((float(by_state), float(by_output)), rel=1e-3)


def small_config(name: str, folder: Path, **cache: Any) -> Config:
    golden = load_golden(name)
    model = {"checkpoint": str(golden.write_checkpoint(folder / f"{name}.pt")), "device": "cpu", **golden.options}
    return Config.model_validate(
        {"model": model, "cache": cache, "sampling": {"num_steps": STEPS, "cfg_scale": 1.5, "batch_size": 8}}
    )


def fit(config: Config, count: int) -> Outcome:
    """Runs on every rank of a pool, or alone."""
    mesh = Mesh.create(LauncherEnv.read(), ep_size=None, device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    return calibrate(engine, [Request(i, i % 10, 7) for i in range(count)], [Request(i, i % 10, 8) for i in range(6)])


@pytest.mark.parametrize("name", ["dsmoe_e8", "dit_moe_qkv"])
@pytest.mark.parametrize("policy", ["network_forecast", "moeca_forecast", "fora"])
def test_calibration_brings_images_it_has_not_seen_closer(name: str, policy: str, tmp_path: Path) -> None:
    """Flow and DDPM solvers, on whole-network, branch and module policies."""
    outcome = fit(small_config(name, tmp_path, policy=policy, interval=3), 8)
    assert outcome.after.rel_l2 < outcome.before.rel_l2


def test_all_ranks_fit_the_same_weights_as_one(tmp_path: Path, two_ranks: Any) -> None:
    """Also where a rank has no image: one image on two ranks."""
    config = small_config("dsmoe_e8", tmp_path, policy="moeca_forecast", interval=3)
    for count in (7, 1):
        alone = fit(config, count)
        first, second = two_ranks.run(fit, config, count)
        assert first.calibration == second.calibration
        assert first.after.rel_l2 == pytest.approx(alone.after.rel_l2, rel=0.02)


@pytest.fixture(scope="module")
def demo_calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "demo.json"
    small = ["--set", f"sampling.num_steps={STEPS}", "--set", "cache={policy: network_forecast, interval: 3}"]
    assert main(["calibrate", "--config", str(DEMO), "--num-images", "10", "--out", str(path), *small]) == 0
    return path


def demo_engine(calibration: Path, *overrides: str) -> Engine:
    settings = [f"sampling.num_steps={STEPS}", "cache={policy: network_forecast, interval: 3}"]
    return Engine.from_config(DEMO, [*settings, f"cache.calibration={calibration}", *overrides])


def test_a_calibrated_run_is_what_was_measured(demo_calibration: Path) -> None:
    measured = json.loads(demo_calibration.read_text())["fitted_on"]
    engine = demo_engine(demo_calibration)
    held_out = [Request(index, index % 10, 8) for index in range(10)]
    exact_BCHW = engine.without_cache().denoise(held_out)
    made_BCHW = engine.denoise(held_out, engine.plan.combine())
    found = float((made_BCHW - exact_BCHW).norm() / exact_BCHW.norm())
    assert found == pytest.approx(measured["after"]["rel_l2"], rel=1e-3)
    assert measured["after"]["psnr_db"] > measured["before"]["psnr_db"] + 1


def test_batches_do_not_matter(demo_calibration: Path) -> None:
    wanted = [Request(index, index, 3) for index in range(5)]
    whole, _ = demo_engine(demo_calibration).generate(wanted)
    single, _ = demo_engine(demo_calibration, "sampling.batch_size=1").generate(wanted)
    assert np.abs(whole.astype(int) - single.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("sampling.num_steps=13", "sampling.num_steps 12, not 13"),
        ("sampling.cfg_scale=2.0", "sampling.cfg_scale 1.5, not 2.0"),
        ("cache.interval=4", "cache.full_steps"),
        ("cache.order=2", "cache.order None, not 2"),
        ("cache.policy=taylorseer", "cache.policy network_forecast, not taylorseer"),
    ],
)
def test_a_run_that_differs_is_refused(demo_calibration: Path, override: str, difference: str) -> None:
    with pytest.raises(UserError, match=f"was fitted for .*{difference}"):
        demo_engine(demo_calibration, override)


def test_other_weights_are_refused(demo_calibration: Path, tmp_path: Path) -> None:
    tree = json.loads(demo_calibration.read_text())
    tree["fitted_for"]["norms"][0] *= 1.01
    (tmp_path / "other.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="other network weights"):
        demo_engine(tmp_path / "other.json")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[1]", '{"format": 1, "fitted_for": {}, "weights": {}}'])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match="moeca calibrate"):
        demo_engine(tmp_path / "bad.json")


def test_missing_rows_and_values_that_are_no_numbers_are_refused(demo_calibration: Path, tmp_path: Path) -> None:
    whole = json.loads(demo_calibration.read_text())
    for damage in (
        lambda steps: steps.pop(),
        lambda steps: steps[0].pop(),
        lambda steps: steps[0].append(float("nan")),
    ):
        tree = json.loads(json.dumps(whole))
        damage(tree["weights"]["steps"])
        (tmp_path / "bad.json").write_text(json.dumps(tree))
        with pytest.raises(UserError, match="is no calibration"):
            demo_engine(tmp_path / "bad.json")


def test_fields_that_nothing_reads_are_refused(demo_calibration: Path, tmp_path: Path) -> None:
    tree = json.loads(demo_calibration.read_text()) | {"ranges": {}}
    (tmp_path / "old.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"has a field ranges, which nothing reads: remove it, or .* moeca calibrate"):
        demo_engine(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--set", "cache={policy: none}"], "nothing to calibrate"),
        (["--set", "cache={policy: teacache}"], "places its full steps while it runs"),
        (["--set", "cache={policy: fora}", "--out", "nowhere/x.json"], "no folder nowhere"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.json")]
    assert main(["calibrate", "--config", str(DEMO), *arguments, *out]) == 2
    assert problem in capsys.readouterr().err


def test_an_earlier_calibration_is_kept_unless_told(demo_calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = demo_calibration.read_text()
    assert main(["calibrate", "--config", str(DEMO), "--out", str(demo_calibration)]) == 2
    assert "--overwrite" in capsys.readouterr().err and demo_calibration.read_text() == before


def test_the_file_is_read_as_it_was_written(demo_calibration: Path) -> None:
    calibration = demo_engine(demo_calibration).calibration
    assert isinstance(calibration, Calibration)
    assert json.loads(calibration.to_json()) == json.loads(demo_calibration.read_text())

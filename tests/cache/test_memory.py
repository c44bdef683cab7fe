"""The cache's size is known before sampling, and a limit that it would exceed is refused there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.cache.policies import POLICIES
from moeca_dist.cli import main
from moeca_dist.config import Config, parse_size
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.runtime.run_plan import RunPlan
from moeca_dist.tuning.calibrate import calibrate
from tests.helpers.golden_files import load_golden

NUM_STEPS = 8
APART = {"conditional": [0, 1, 3, 5, 7], "unconditional": [0, 4]}
KNOBS: list[dict[str, Any]] = [
    *({"policy": policy} for policy in POLICIES if policy != "teacache"),
    *({"policy": policy, "full_steps": [0]} for policy in ("taylorseer", "moeca_forecast", "moeca")),
    *({"policy": policy, "full_steps": APART} for policy in ("fora", "moeca", "toca", "moeca_forecast")),
    *({"policy": "moeca_forecast", "order": order} for order in (0, 1)),
    {"policy": "moeca_forecast", "attention_sync": True},
    {"policy": "moeca", "attention_sync": False},
    *({"policy": "taylorseer", "order": order} for order in (0, 2, 3)),
    {"policy": "teacache", "delta": 0.008},
]


def make_config(folder: Path, network: str = "dsmoe_e12", cfg: float = 1.5, **cache: Any) -> Config:
    golden = load_golden(network)
    path = folder / f"{network}.safetensors"
    if not path.exists():
        golden.write_checkpoint(path)
    if cache and cache["policy"] != "teacache":
        cache = {"full_steps": [0, 1, 4]} | cache
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "cache": cache,
            "sampling": {"num_steps": NUM_STEPS, "batch_size": 2, "cfg_scale": cfg},
        }
    )


def generate(config: Config, count: int) -> tuple[Report, list[int]]:
    """The report, and what a rank is predicted to keep for each share of images that ranks may have."""
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    _, report = engine.generate([Request(index, index % 10) for index in range(count)])
    size = engine.plan.cache_size()
    assert size is not None
    return report, [size.of(images) for images in range(4)]


@pytest.mark.parametrize("network", ["dsmoe_e12", "dit_moe_flash"])
@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(str(value)[:12] for value in knobs.values()))
def test_the_prediction_is_the_peak(knobs: dict[str, Any], network: str, tmp_path: Path) -> None:
    for cfg in (1.5,) if knobs.get("full_steps") is APART else (1.0, 1.5):
        report, predicted = generate(make_config(tmp_path, network, cfg, **knobs), 3)
        assert report.cache.bytes_peak == predicted[2]  # two rounds, of two images and of one


@pytest.mark.parametrize("full_steps", [[0], [0, 1, 4], [0, 1, 2, 3, 7], APART], ids=str)
@pytest.mark.parametrize("network", ["dsmoe_e12", "dit_moe_flash"])
@pytest.mark.parametrize("policy", ["network_forecast", "moeca_forecast", "fora"])
def test_remembered_outputs_are_predicted(policy: str, network: str, full_steps: Any, tmp_path: Path) -> None:
    config = make_config(tmp_path, network, policy=policy, full_steps=full_steps)
    plain = generate(config, 3)[1][2]
    requests = [Request(index, index % 10) for index in range(2)]
    engine = Engine.from_config(config)
    outcome = calibrate(engine, requests, requests)
    (tmp_path / "fitted.json").write_text(outcome.calibration.to_json())
    cache = config.cache.model_copy(update={"calibration": tmp_path / "fitted.json"})
    report, predicted = generate(config.model_copy(update={"cache": cache}), 3)
    assert report.cache.bytes_peak == predicted[2] > plain
    limits = [config.cache.model_copy(update={"memory_limit": f"{predicted[2] - short}B"}) for short in (0, 1)]
    engines = [
        Engine(config.model_copy(update={"cache": cache}), engine.mesh, engine.model, calibration=outcome.calibration)
        for cache in limits
    ]
    engines[0].check_memory(2)
    with pytest.raises(UserError, match="memory_limit"):
        engines[1].check_memory(2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("policy", ["moeca", "moeca_forecast", "network_forecast", "taylorseer", "toca", "dice_skip"])
def test_the_prediction_knows_the_dtype(policy: str, dtype: str, tmp_path: Path) -> None:
    report, predicted = generate(make_config(tmp_path, policy=policy, dtype=dtype), 2)
    assert report.cache.bytes_peak == predicted[2]


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_keep_what_one_is_predicted_to(two_ranks: Any, policy: str, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, **({"policy": policy, "delta": 0.008} if policy == "teacache" else {"policy": policy})
    )
    report, predicted = two_ranks.run(generate, config, 3)[0]
    assert report.cache.bytes_peak == predicted[1] + predicted[2]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "knobs", [{"policy": "moeca_forecast"}, {"policy": "random"}, {"policy": "dice_skip"}], ids=str
)
def test_owners_keep_no_more_than_predicted(request: Any, knobs: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])
    report, predicted = pool.run(generate, make_config(tmp_path, location="owner", **knobs), 2 * ranks)[0]
    assert 0.2 * ranks * predicted[2] < report.cache.bytes_peak <= ranks * predicted[2]


def refused(config: Config, num_images: int) -> str | None:
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("sampling began"))
    try:
        engine.check_memory(num_images)
        return None
    except UserError as error:
        with pytest.raises(UserError):
            engine.generate([Request(index, 0) for index in range(num_images)])
        return str(error)


def test_what_does_not_fit_is_refused_before_sampling(tmp_path: Path) -> None:
    config = make_config(tmp_path, policy="moeca_forecast")
    exactly = generate(config, 2)[1]
    for limit, fits in ((exactly[2], True), (exactly[2] - 1, False)):
        cache = config.cache.model_copy(update={"memory_limit": f"{limit}B"})
        said = refused(config.model_copy(update={"cache": cache}), 3)
        assert (said is None) is fits
    assert said is not None and "on a rank with 2 images" in said and "take sampling.batch_size 1, cache.dtype" in said
    cache = config.cache.model_copy(update={"memory_limit": "10B", "dtype": "bfloat16"})
    said = refused(config.model_copy(update={"cache": cache}), 1)
    assert said is not None and "one image is too much already" in said and "cache.dtype" not in said


def test_all_ranks_refuse_together(two_ranks: Any, tmp_path: Path) -> None:
    """Three images: only one of the ranks has two of them, and both refuse."""
    config = make_config(tmp_path, policy="moeca_forecast")
    exactly = two_ranks.run(generate, config, 3)[0][1]
    cache = config.cache.model_copy(update={"memory_limit": f"{exactly[2] - 1}B"})
    said = two_ranks.run(refused, config.model_copy(update={"cache": cache}), 3)
    assert said[0] == said[1] and "take sampling.batch_size 1" in said[0]


def test_the_command_refuses_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(make_config(tmp_path, policy="moeca_forecast").to_yaml())
    argv = ["generate", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--num-images", "2"]
    assert main([*argv, "--compare-uncached", "--set", "cache.memory_limit=20KB"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "over cache.memory_limit 20KB (19.53 KiB)" in lines[0]
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--set", "cache.memory_limit=0.5"]) == 0


def test_a_share_is_one_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, policy="moeca_forecast", memory_limit=1e-9)
    plan = RunPlan.resolve(config, 1)
    with pytest.raises(UserError, match=r"over cache\.memory_limit 1e-09"):
        plan.check_memory(1, torch.device("cpu"))
    size = plan.cache_size()
    assert size is not None
    memory = type("Properties", (), {"total_memory": size.of(1) * 10**9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    on_gpu = torch.device("cuda", 0)
    plan.check_memory(1, on_gpu)
    with pytest.raises(UserError, match="a rank with 2 images"):
        plan.check_memory(2, on_gpu)


def test_a_batch_to_calibrate_on_is_limited_too(tmp_path: Path) -> None:
    config = make_config(tmp_path, policy="moeca_forecast")
    size = generate(config, 1)[1]
    cache = config.cache.model_copy(update={"memory_limit": f"{size[2]}B"})
    engine = Engine.from_config(config.model_copy(update={"cache": cache}))
    requests = [Request(index, 0) for index in range(3)]
    calibrate(engine, requests[:2], requests[:2])
    with pytest.raises(UserError, match=r"a rank with 3 images.*take a batch of 2, cache\.dtype"):
        calibrate(engine, requests, requests[:2])


def test_sizes() -> None:
    sizes = {"2GiB": 2 * 2**30, "1.5 GB": 1_500_000_000, "300MB": 300_000_000, "7KiB": 7168, "12B": 12, "1TB": 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("2", "GiB", "2iB", "-1GB", "0B", "1e3MB", "2 gib", ""):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


@pytest.mark.parametrize("limit", [0, 1.5, -0.5, 2048])
def test_numbers_are_shares(limit: float) -> None:
    with pytest.raises(ValueError, match="neither a share of the memory"):
        Config.model_validate({"cache": {"policy": "fora", "memory_limit": limit}})

"""The engine: the same images whatever the world, the batch and the neighbours; and what it reports.

Shape suffixes: N images, C channels, H and W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from tests.helpers.golden_files import load_golden

TOLERANCE = 1e-5  # relative L2, fp32


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The ``model:`` section for a DSMoE and a DDPM DiT-MoE of golden size, as original files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sections = {}
    for name in ("dsmoe_e8", "dit_moe_qkv"):
        golden = load_golden(name)
        path = golden.write_checkpoint(folder / f"{name}.pt")
        sections[name] = {"checkpoint": str(path), "device": "cpu", **golden.options}
    return sections


def make_config(model: dict[str, Any], **parallel: Any) -> Config:
    sampling = {"num_steps": 4, "cfg_scale": 1.5, "batch_size": 3}
    return Config.model_validate({"model": model, "parallel": parallel, "sampling": sampling})


def make_requests(count: int) -> list[Request]:
    return [Request(index, index % 10, seed=7) for index in range(count)]


def generate(config: Config, requests: list[Request]) -> tuple[NDArray[np.generic], Report]:
    """Runs on every rank of a pool, or alone."""
    env = LauncherEnv.read()
    mesh = Mesh.create(env, ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)
    return Engine.from_config(config, mesh=mesh).generate(requests)


def relative_l2(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["dsmoe_e8", "dit_moe_qkv"])
@pytest.mark.parametrize("count", [1, 7], ids=["more ranks than images", "7 images"])
@pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2), (4, 1)], ids=["EP2", "EP4", "DP2xEP2", "DP4"])
def test_images_do_not_depend_on_the_world(request, checkpoints, name, count, world) -> None:
    num_ranks, ep_size = world
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    expected, alone = generate(make_config(checkpoints[name]), make_requests(count))
    results = pool.run(generate, make_config(checkpoints[name], ep_size=ep_size), make_requests(count))
    assert relative_l2(results[0][0], expected) <= TOLERANCE
    assert all(len(images) == 0 for images, _ in results[1:])
    report = results[0][1]
    assert (report.world_size, report.ep_size, report.dp_size) == (num_ranks, ep_size, num_ranks // ep_size)
    assert (report.flops, report.branches) == (alone.flops, alone.branches)
    assert (report.exchange.bytes_sent > 0) == (ep_size > 1)


def test_an_image_does_not_depend_on_its_batch(checkpoints) -> None:
    config = make_config(checkpoints["dsmoe_e8"])
    whole, _ = generate(config, make_requests(7))
    alone, _ = generate(config, make_requests(7)[5:6])
    assert relative_l2(alone, whole[5:6]) <= TOLERANCE


def test_no_requests_is_no_images(checkpoints) -> None:
    images, report = generate(make_config(checkpoints["dsmoe_e8"]), [])
    assert images.shape == (0, 4, 8, 8)
    assert report.num_images == 0 and report.images_per_s == 0.0


def test_report_counts_branches_and_bytes(two_ranks, checkpoints) -> None:
    config = make_config(checkpoints["dsmoe_e8"])
    _, report = two_ranks.run(generate, config, make_requests(4))[0]
    tokens, k, moe_layers, halves, steps = 16, 2, 2, 2, 4
    assert report.branches.routed == 4 * halves * steps * moe_layers * tokens * k == report.branches.refreshed
    # Rounds x steps x layers x legs; both ranks hold two images, in one round.
    assert report.exchange.collectives == steps * moe_layers * 2
    assert report.exchange.collectives_skipped == 0
    assert 0 < report.exchange.bytes_sent == report.exchange.bytes_full < report.branches.routed * 2 * 32 * 4
    assert report.flops.computed == report.flops.full and report.quality is None


def test_labels_are_checked(checkpoints) -> None:
    with pytest.raises(UserError, match=r"label 10 is out of range: this model has 10 classes, 0-9"):
        generate(make_config(checkpoints["dsmoe_e8"]), [Request(0, 10)])


def fail_to_load(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        generate(config, make_requests(1))
    return str(caught.value)


def test_one_rank_without_its_checkpoint_fails_on_all(two_ranks, checkpoints, tmp_path: Path) -> None:
    missing = str(tmp_path / "absent.pt")
    messages = two_ranks.run(fail_to_load_on_rank_one, make_config(checkpoints["dsmoe_e8"]), missing)
    assert all("absent.pt does not exist" in message and "rank 1: " in message for message in messages)


def fail_to_load_on_rank_one(config: Config, missing: str) -> str:
    if LauncherEnv.read().rank == 1:
        config = make_config(config.model.model_dump() | {"checkpoint": missing})
    return fail_to_load(config)


def test_a_threshold_without_effect_is_said_once(checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(checkpoints["dsmoe_e8"])
    cache = config.cache.model_copy(update={"policy": "moeca", "interval": 2, "refresh_ratio": 1e-6})
    generate(config.model_copy(update={"cache": cache}), make_requests(5))  # two batches
    said = [record.message for record in caplog.records if "cache.refresh_ratio" in record.message]
    assert len(said) == 1 and "chose nothing" in said[0]

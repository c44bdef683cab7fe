"""What only a CUDA device can show; run with ``make gpu``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeca_dist import Engine, Request, load_model
from moeca_dist.config import Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from tests.helpers.golden_files import EULER_TOLERANCE, GOLDEN_NAMES, load_golden
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """cuDNN convolutions round to TF32 unless told otherwise; golden values are fp32."""
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(scope="module")
def two_cuda_ranks() -> Iterator[RankPool]:
    pool = RankPool(2, device_type="cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_forward(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    model = load_model(golden.write_checkpoint(tmp_path / "model.pt"), device="cuda", **golden.options)
    output = model(golden["x"].cuda(), golden["t"].cuda(), golden["y"].cuda())
    # Ten times the tolerance of the CPU that made the values: other kernels, other orders of summation.
    torch.testing.assert_close(output.cpu(), golden["output"], atol=EULER_TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["DSMoE-S-E16", "DSMoE-S-E48"])
def test_published_shapes_in_low_precision(name: str, dtype: str) -> None:
    """Random weights: the low-precision image stays near the fp32 one, and nothing overflows."""
    reference, _ = generate(random_config(name, "float32"), requests(2))
    images, _ = generate(random_config(name, dtype), requests(2))
    assert np.isfinite(images).all()
    assert np.linalg.norm(images - reference) / np.linalg.norm(reference) < 0.1


@pytest.mark.parametrize("ep_size", [2, 1], ids=["EP2", "DP2"])
def test_two_ranks_share_one_gpu(two_cuda_ranks: RankPool, ep_size: int) -> None:
    """NCCL refuses two ranks on one device; gloo stages the rows through the host."""
    config = random_config("DSMoE-S-E48", "float32")
    expected, _ = generate(config, requests(3))
    images, report = two_cuda_ranks.run(generate, config, requests(3), ep_size)[0]
    assert np.linalg.norm(images - expected) / np.linalg.norm(expected) <= 1e-4
    assert (report.exchange.bytes_sent > 0) == (ep_size == 2)


def test_int8_rows_without_a_cache(two_cuda_ranks: RankPool) -> None:
    """Random weights: routes lie near ties, so codes move some of them."""
    config = random_config("DSMoE-S-E48", "float32")
    coded = config.model_copy(update={"parallel": config.parallel.model_copy(update={"row_dtype": "int8"})})
    expected, _ = two_cuda_ranks.run(generate, config, requests(3), 2)[0]
    images, _ = two_cuda_ranks.run(generate, coded, requests(3), 2)[0]
    assert np.linalg.norm(images - expected) / np.linalg.norm(expected) <= 0.2


@pytest.mark.parametrize("name", ["DSMoE-S-E16", "DSMoE-S-E48"])
def test_replayed_graphs_are_the_eager_run(name: str) -> None:
    """Rounds of four images and one of two, twice with other seeds: the same bits."""
    base = random_config(name, "bfloat16").model_dump()
    values = base | {"sampling": {"num_steps": 6, "batch_size": 4}}
    eager = Engine.from_config(Config.model_validate(values))
    values["model"] = base["model"] | {"cuda_graphs": True}
    graphed = Engine(Config.model_validate(values), eager.mesh, eager.model)
    for seed in (1, 2):
        wanted = [Request(index, index, seed) for index in range(6)]
        expected, alone = eager.generate(wanted)
        images, report = graphed.generate(wanted)
        assert np.array_equal(images, expected)
        assert (report.branches, report.flops) == (alone.branches, alone.flops)
        assert "graph" in report.seconds.slowest


@pytest.mark.parametrize("policy", ["moeca_forecast", "taylorseer", "network_forecast"])
def test_triton_kernels_make_the_images_of_the_references(policy: str) -> None:
    """Compiled, in whole networks."""
    values = random_config("DSMoE-S-E16", "float32").model_dump() | {"cache": {"policy": policy, "interval": 2}}
    expected, _ = generate(Config.model_validate(values), requests(2))
    values["model"] |= {"kernels": "triton"}
    images, _ = generate(Config.model_validate(values), requests(2))
    assert np.linalg.norm(images - expected) / np.linalg.norm(expected) <= 1e-3


def requests(count: int) -> list[Request]:
    return [Request(index, index) for index in range(count)]


def random_config(name: str, dtype: str) -> Config:
    values: dict[str, Any] = {
        "model": {"name": name, "random_init": True, "dtype": dtype, "device": "cuda"},
        "parallel": {"backend": "gloo"},
        "sampling": {"num_steps": 3, "cfg_scale": 1.5},
    }
    return Config.model_validate(values)


def generate(config: Config, wanted: list[Request], ep_size: int = 1) -> Any:
    torch.backends.cudnn.allow_tf32 = False
    mesh = Mesh.create(LauncherEnv.read(), ep_size=ep_size, device_type="cuda", backend="gloo", timeout_s=120)
    return Engine.from_config(config, mesh=mesh).generate(wanted)

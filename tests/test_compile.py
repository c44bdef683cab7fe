"""``model.compile``: the same images to rounding, on any number of ranks, and nothing is compiled after loading."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.checks import check_config
from moeca_dist.config import Config
from moeca_dist.models.blocks import EAGER
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from tests.golden_files import load_golden

ROOT = Path(__file__).parent.parent
NUM_STEPS = 6
CACHES: list[dict[str, Any]] = [{"policy": "none"}, {"policy": "network_forecast", "full_steps": [0, 1, 4]}]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")


def make_config(
    folder: Path,
    network: str,
    compiled: bool,
    cache: dict[str, Any] = CACHES[0],
    parallel: dict[str, Any] | None = None,
) -> Config:
    golden = load_golden(network)
    path = folder / f"{network}.safetensors"
    if not path.exists():
        golden.write_checkpoint(path)
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", "compile": compiled, **golden.options},
            "parallel": parallel or {},
            "cache": cache,
            "sampling": {"num_steps": NUM_STEPS, "batch_size": 2},
        }
    )


def generate(config: Config, count: int) -> tuple[NDArray[np.generic], Report, int]:
    """Images, report, and how many graphs were compiled after the network was loaded."""
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=170)
    engine = Engine.from_config(config, mesh=mesh)
    assert all((block.parts is not EAGER) == config.model.compile for block in engine.model.blocks)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    images, report = engine.generate([Request(index, index % 10, seed=3) for index in range(count)])
    return images, report, stats["unique_graphs"] - before


def difference(images: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    assert images.shape == expected.shape
    return float(np.linalg.norm(images - expected) / np.linalg.norm(expected))


@needs_compiler
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["policy"])
@pytest.mark.parametrize("network", ["dsmoe_e12", "dit_moe_flash"])
def test_images_are_the_same_to_rounding(network: str, cache: dict[str, Any], tmp_path: Path) -> None:
    """Rounds of two images and of one: four network rows, and two."""
    expected, exact, _ = generate(make_config(tmp_path, network, False, cache), 3)
    images, report, late = generate(make_config(tmp_path, network, True, cache), 3)
    assert 0 < difference(images, expected) <= 1e-5
    assert (report.flops, report.branches, report.cache.bytes_peak) == (
        exact.flops,
        exact.branches,
        exact.cache.bytes_peak,
    )
    assert late == 0


@needs_compiler
@pytest.mark.parametrize("count", [1, 3], ids=["a rank without images", "three images"])
def test_ranks_compile_together(two_ranks: Any, count: int, tmp_path: Path) -> None:
    expected, _, _ = generate(make_config(tmp_path, "dsmoe_e12", False, CACHES[1]), count)
    results = two_ranks.run(generate, make_config(tmp_path, "dsmoe_e12", True, CACHES[1]), count)
    assert difference(results[0][0], expected) <= 1e-5
    assert [late for _, _, late in results] == [0, 0]
    assert results[0][1].exchange.bytes_sent > 0


@needs_compiler
def test_compiled_blocks_code_their_rows(two_ranks: Any, tmp_path: Path) -> None:
    configs = [make_config(tmp_path, "dsmoe_e12", compiled, parallel={"rows": "int8"}) for compiled in (False, True)]
    (expected, before, _), (images, after, _) = (two_ranks.run(generate, config, 3)[0] for config in configs)
    assert after.exchange.reference_bytes == before.exchange.reference_bytes > 0
    assert after.exchange.bytes_sent == before.exchange.bytes_sent
    assert difference(images, expected) <= 2e-4


@pytest.mark.parametrize("policy", ["taylorseer", "moeca", "moeca_forecast", "fora"])
def test_what_would_have_no_effect_is_refused(policy: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, "dsmoe_e12", True, {"policy": policy})
    with pytest.raises(UserError, match=f"model.compile has no effect with cache.policy {policy}"):
        check_config(config, [0])


def test_graphs_are_another_way() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Config.model_validate({"model": {"compile": True, "cuda_graphs": True}})


@needs_compiler
def test_other_caches_over_a_compiled_network(tmp_path: Path) -> None:
    engine = Engine.from_config(make_config(tmp_path, "dsmoe_e12", True), mesh=Mesh.single())
    requests = [Request(index, index) for index in range(2)]
    other = engine.with_cache(make_config(tmp_path, "dsmoe_e12", False, {"policy": "taylorseer"}).cache)
    assert np.isfinite(other.generate(requests)[0]).all()
    assert np.array_equal(engine.without_cache().generate(requests)[0], engine.generate(requests)[0])


def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(make_config(tmp_path, "dsmoe_e12", True).to_yaml())
    command = [sys.executable, "launch/generate.py", "--config", str(tmp_path / "run.yaml")]
    environment = os.environ | {"CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o"), "--num-images", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "model.compile" in line]
    assert len(lines) == 1 and "C++ compiler" in lines[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()

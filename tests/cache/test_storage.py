"""Values kept smaller: what they lose, what they save, and that nothing is lost of what a step computes.

Shape suffixes: D hidden size, N rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.cache.module_cache import KeyValueCache, ModuleCache, TokenIndex
from moeca_dist.cache.policies.registry import POLICIES, build_policy
from moeca_dist.cache.storage import storage_of
from moeca_dist.config import CacheConfig, Config
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from tests.helpers.golden_files import load_golden

# Largest relative error of a rounded value, for float8 relative to the row's largest.
ROUNDING = {"bfloat16": 2**-8, "float8_e4m3fn": 2**-4}
SMALLER = pytest.mark.parametrize("dtype", ROUNDING)
NUM_STEPS = 8


@SMALLER
def test_rows_come_back_rounded(dtype: str) -> None:
    draw = torch.Generator().manual_seed(0)
    values_ND = torch.randn(7, 48, generator=draw) * torch.logspace(-6, 4, 7)[:, None]
    packed = storage_of(dtype).pack(values_ND)
    found_ND = packed.unpack()
    assert found_ND.dtype == torch.float32 and not packed.is_exact
    limit_ND = values_ND.abs()
    if dtype == "float8_e4m3fn":
        limit_ND = limit_ND.clamp(min=0.1 * limit_ND.amax(-1, keepdim=True))
    assert ((found_ND - values_ND).abs() <= ROUNDING[dtype] * limit_ND).all()
    index_N = torch.tensor([5, 0])
    assert torch.equal(packed.rows(index_N), found_ND[index_N])
    packed.put(index_N, values_ND[[2, 3]])
    assert torch.equal(packed.unpack(), found_ND[[3, 1, 2, 3, 4, 2, 6]])


@SMALLER
def test_extremes_stay_finite(dtype: str) -> None:
    values_ND = torch.tensor([[0.0, 0.0], [1e30, -1e30], [1e-30, 0.0], [448.0, 449.0]])
    found_ND = storage_of(dtype).pack(values_ND).unpack()
    assert found_ND.isfinite().all() and (found_ND[0] == 0).all()
    assert storage_of(dtype).pack(values_ND[:0]).unpack().shape == (0, 2)


@SMALLER
def test_bytes_are_those_of_the_tensors(dtype: str) -> None:
    storage, width = storage_of(dtype), 48
    expected = width + 4 if dtype == "float8_e4m3fn" else 2 * width
    assert storage.row_bytes(width, 4) == expected
    assert storage.zeros((3, 5, width), torch.zeros(1)).num_bytes == 15 * expected
    assert storage_of("model").row_bytes(width, 4) == storage_of("model").zeros((width,), torch.zeros(1)).num_bytes
    cache = ModuleCache(1, storage)
    for step in range(2):
        cache.store(torch.randn(2, 5, width), step)
    assert cache.num_bytes == 2 * 10 * expected


@SMALLER
def test_a_forecast_goes_through_what_is_stored(dtype: str) -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, 3, 16, generator=draw)
    cache = ModuleCache(1, storage_of(dtype))
    cache.store(first.clone(), 0)
    cache.store(second.clone(), 2)
    out = cache.forecast(3).sum()
    largest = max(first.abs().max(), second.abs().max())
    torch.testing.assert_close(out, second + (second - first) / 2, atol=3 * ROUNDING[dtype] * float(largest), rtol=0)


@SMALLER
def test_fresh_keys_are_read_as_computed(dtype: str) -> None:
    draw = torch.Generator().manual_seed(0)
    kept, tokens = KeyValueCache(storage_of(dtype)), TokenIndex(torch.tensor([1, 6]), 4)
    kept.store(*torch.randn(2, 2, 3, 4, 8, generator=draw))
    fresh = torch.randn(2, 3, 2, 8, generator=draw)
    keys_BHTC, values_BHTC = kept.refresh(tokens, *fresh)
    assert torch.equal(keys_BHTC[[0, 1], :, [1, 2]].transpose(0, 1), fresh[0])
    assert torch.equal(values_BHTC[[0, 1], :, [1, 2]].transpose(0, 1), fresh[1])


# ---- whole runs ------------------------------------------------------------------------------------------------------


def make_config(folder: Path, **cache: Any) -> Config:
    golden = load_golden("dsmoe_e8")
    path = folder / "model.safetensors"
    if not path.exists():
        golden.write_checkpoint(path)
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "cache": cache,
            "sampling": {"num_steps": NUM_STEPS, "batch_size": 4},
        }
    )


def generate(config: Config) -> tuple[Any, Report]:
    engine = Engine.from_config(config, mesh=Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60))
    return engine.generate([Request(index, index % 10, seed=3) for index in range(5)])


@SMALLER
@pytest.mark.parametrize("policy", POLICIES)
def test_zero_reuse_stays_bit_identical(policy: str, dtype: str, tmp_path: Path) -> None:
    placed: dict[str, Any] = {"delta": 0.0} if policy == "teacache" else {"full_steps": list(range(NUM_STEPS))}
    expected, _ = generate(make_config(tmp_path))
    images, _ = generate(make_config(tmp_path, policy=policy, dtype=dtype, **placed))
    assert np.array_equal(images, expected)


@SMALLER
@pytest.mark.parametrize("policy", ["moeca", "random"])
def test_refreshing_everything_stays_exact(policy: str, dtype: str, tmp_path: Path) -> None:
    """Every branch and every attention row computed anew, one by one: nothing that was stored is used."""
    everything = {"refresh_ratio": 1.0} if policy == "moeca" else {"ratio": 1.0, "attention_sync": True}
    config = {"policy": policy, "full_steps": [0, 4], **everything}
    expected, _ = generate(make_config(tmp_path, **config))
    images, report = generate(make_config(tmp_path, dtype=dtype, **config))
    assert report.branches.reuse_ratio == 0
    # The dense block before the first MoE block is reused, so it alone was stored smaller.
    assert np.linalg.norm(images - expected) <= 0.05 * np.linalg.norm(expected)


@SMALLER
@pytest.mark.parametrize("policy", POLICIES)
def test_quality_and_bytes(policy: str, dtype: str, tmp_path: Path) -> None:
    placed: dict[str, Any] = {"delta": 0.008} if policy == "teacache" else {"full_steps": [0, 1, 4]}
    expected, whole = generate(make_config(tmp_path, policy=policy, **placed))
    images, report = generate(make_config(tmp_path, policy=policy, dtype=dtype, **placed))
    error = np.linalg.norm(images - expected) / np.linalg.norm(expected)
    assert 0 < error <= {"bfloat16": 0.02, "float8_e4m3fn": 0.2}[dtype]
    assert report.cache.bytes_peak < (0.75 if dtype == "float8_e4m3fn" else 0.85) * whole.cache.bytes_peak


@SMALLER
def test_owners_store_smaller_too(two_ranks: Any, dtype: str, tmp_path: Path) -> None:
    common = {"policy": "moeca_forecast", "location": "owner"}
    expected, _ = two_ranks.run(generate, make_config(tmp_path, **common, full_steps=list(range(NUM_STEPS))))[0]
    same, _ = two_ranks.run(
        generate, make_config(tmp_path, **common, full_steps=list(range(NUM_STEPS)), dtype=dtype)
    )[0]  # fmt: skip
    assert np.linalg.norm(same - expected) <= 1e-5 * np.linalg.norm(expected)
    expected, whole = two_ranks.run(generate, make_config(tmp_path, **common, full_steps=[0, 1, 4]))[0]
    images, report = two_ranks.run(generate, make_config(tmp_path, **common, full_steps=[0, 1, 4], dtype=dtype))[0]
    assert 0 < np.linalg.norm(images - expected) <= 0.2 * np.linalg.norm(expected)
    assert report.cache.bytes_peak < 0.85 * whole.cache.bytes_peak


def test_a_dtype_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache.dtype bfloat16 has no effect, model.dtype is the same"):
        Config.model_validate({"model": {"dtype": "bfloat16"}, "cache": {"policy": "fora", "dtype": "bfloat16"}})
    with pytest.raises(UserError, match=r"cache.dtype has no effect with cache.policy none"):
        build_policy(CacheConfig(dtype="bfloat16"), NUM_STEPS, guided=True)

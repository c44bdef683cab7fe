"""The Triton kernels against their references, in Triton's interpreter on CPU: ragged, empty and unaligned shapes.

Shape suffixes: S source rows, D hidden size, R rows, T tokens, N branches, B images.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist import Engine, Request
from moeca_dist.cache.storage import Packed
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.kernels import select
from moeca_dist.kernels.reference import ReferenceKernels
from moeca_dist.kernels.select import kernels_of
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    Kernels,
    StoredBranches,
)
from tests.helpers.golden_files import load_golden

REFERENCE = ReferenceKernels()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([1, 7, 16, 40, 65])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def triton_kernels() -> Kernels:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a CUDA device the kernels are compiled; tests/kernels/test_gpu.py has them there")
    return kernels_of("triton", torch.device("cpu"))


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE.get(expected.dtype, 0)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance * 4, rtol=tolerance)


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 9), WIDTHS, DTYPES, st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_gather_rows(
    triton_kernels: Kernels, rows: int, sources: int, experts: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Any counts, experts without rows, and source rows that are slices of wider ones: bit for bit."""
    draw = torch.Generator().manual_seed(seed)
    x_SD = torch.randn(sources, width + 3, generator=draw).to(dtype)[:, 3:]
    source_R = torch.randint(0, sources, (rows,), generator=draw)
    expert_R = torch.randint(0, experts, (rows,), generator=draw)
    found, expected = (each.gather_rows(x_SD, source_R, expert_R, experts) for each in (triton_kernels, REFERENCE))
    assert torch.equal(found.rows_RD, expected.rows_RD)
    assert torch.equal(found.counts_L, expected.counts_L) and torch.equal(found.position_R, expected.position_R)


def make_branches(
    tokens: int, most: int, width: int, dtype: torch.dtype, forecast: bool, draw: Any
) -> tuple[StoredBranches, BranchesToServe, FreshRows]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    per_token_T = torch.randint(0, most + 1, (tokens,), generator=draw)
    token_N = torch.arange(tokens).repeat_interleave(per_token_T)
    num, start_T = len(token_N), per_token_T.cumsum(0) - per_token_T
    values, slopes = (Packed(normal(num, width), None, dtype) for _ in range(2))
    step_N = torch.randint(0, 5, (num,), generator=draw, dtype=torch.int32)
    row_N = torch.randperm(num, generator=draw)
    found_N = torch.rand(num, generator=draw) < 0.7
    refresh_N = (torch.rand(num, generator=draw) < 0.3) | ~found_N
    gate_N = torch.rand(num, generator=draw)
    branch_M = refresh_N.nonzero().squeeze(1)
    row_M = torch.randperm(len(branch_M), generator=draw)
    stored = StoredBranches(values, slopes if forecast else None, step_N)
    fresh = FreshRows(normal(len(branch_M), width), branch_M, row_M)
    return stored, BranchesToServe(token_N, start_T, gate_N, row_N, found_N, refresh_N), fresh


def copied(stored: StoredBranches) -> StoredBranches:
    def copy(packed: Any) -> Any:
        return None if packed is None else Packed(packed.data_XD.clone(), None, packed.dtype)

    return StoredBranches(copy(stored.values_ND), copy(stored.slopes_ND), stored.step_N.clone())


SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 4), WIDTHS, DTYPES, st.booleans())


@given(SHAPES, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_serve_branches(triton_kernels: Kernels, shape: Any, seed: int) -> None:
    """The sums, and what is stored afterwards: values bit for bit, slopes to rounding, and who was stored when.

    Tokens have from no branch to several.
    """
    tokens, most, width, dtype, forecast = shape
    made = make_branches(tokens, most, width, dtype, forecast, torch.Generator().manual_seed(seed))
    here, there = copied(made[0]), copied(made[0])
    found, expected = triton_kernels.serve_branches(here, *made[1:], 7), REFERENCE.serve_branches(there, *made[1:], 7)
    close(found, expected)
    assert torch.equal(here.values_ND.unpack(), there.values_ND.unpack())
    assert torch.equal(here.step_N, there.step_N)
    if here.slopes_ND is not None and there.slopes_ND is not None:
        close(here.slopes_ND.unpack(), there.slopes_ND.unpack())


@given(st.integers(0, 3), st.integers(1, 5), WIDTHS, DTYPES, st.integers(0, 3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_residual(
    triton_kernels: Kernels,
    images: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    order: int,
    by_row: bool,
    seed: int,
) -> None:
    """Forecasts of order 0 to 3 with shared or single ages, gates and modulation as chunks of one wider tensor."""
    draw = torch.Generator().manual_seed(seed)
    shape = (images, tokens, width)
    x_BTD, value_BTD, *differences = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2 + order))
    gate_BD, shift_BD, scale_BD = torch.randn(images, 3 * width, generator=draw).to(dtype).chunk(3, -1)
    ages_BT1 = torch.randint(0, 4, (images, tokens, 1), generator=draw, dtype=torch.int32)
    factors = [ages_BT1 / (1 + degree) if by_row else 0.5 + degree for degree in range(order)]
    forecast = Forecast(value_BTD, list(zip(differences, factors, strict=True)))
    found, expected = [], []
    for kernels, outputs in ((triton_kernels, found), (REFERENCE, expected)):
        outputs += [torch.empty_like(x_BTD) for _ in range(3)]
        kernels.gated_residual(x_BTD, gate_BD, forecast, outputs[0])
        entering = Entering(outputs[2], shift_BD, scale_BD)
        kernels.residual_modulated(x_BTD, gate_BD, forecast, outputs[1], entering)
    close(found[0], expected[0])
    close(found[1], expected[1])
    if width > 1 and dtype == torch.float32:  # the norm of one value is 0 / sqrt(eps), which magnifies rounding
        torch.testing.assert_close(found[2], expected[2], atol=1e-3, rtol=1e-3)
    elif width > 7:
        torch.testing.assert_close(found[2], expected[2], atol=0.15, rtol=0.05)


def test_the_name_chooses() -> None:
    for device in ("cpu", "cuda"):
        assert type(kernels_of("torch", torch.device(device))) is ReferenceKernels


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU outside the interpreter, and where it is not installed: one line with the remedy."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UserError, match=r"triton needs a CUDA device, not cpu: set model\.kernels=torch"):
        kernels_of("triton", torch.device("cpu"))
    monkeypatch.setattr(select, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Triton is not installed; install it, or set model\.kernels=torch"):
        kernels_of("triton", torch.device("cuda"))


def test_the_key_names_known_kernels() -> None:
    assert Config().model.kernels == "torch"
    with pytest.raises(ValueError, match="'torch' or 'triton'"):
        Config.model_validate({"model": {"kernels": "cuda"}})


def test_an_engine_refuses_kernels_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"set model\.kernels=torch"):
        Engine.from_config(make_config(tmp_path, {}, kernels="triton"))


def make_config(folder: Path, cache: dict[str, Any], **model: Any) -> Config:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(folder / "model.safetensors")
    return Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options, **model},
            "cache": cache,
            "sampling": {"num_steps": 5},
        }
    )


@pytest.mark.parametrize("policy", ["none", "moeca_forecast", "taylorseer", "random"])
def test_whole_networks(triton_kernels: Kernels, policy: str, tmp_path: Path) -> None:
    """Every kernel where it runs on a GPU, with full, served and mixed steps: the images of the references."""
    halves = {"conditional": [0, 1, 3], "unconditional": [0, 1]}
    cache: dict[str, Any] = {} if policy == "none" else {"policy": policy, "full_steps": halves}
    requests = [Request(index, index) for index in range(2)]
    expected, by_reference = Engine.from_config(make_config(tmp_path, cache)).generate(requests)
    engine = Engine.from_config(make_config(tmp_path, cache, kernels="triton"))
    assert type(engine.model.kernels) is type(triton_kernels)
    assert all(block.kernels is engine.model.kernels for block in engine.model.adaln_blocks())
    assert all(layer.dispatcher.kernels is engine.model.kernels for _, layer in engine.model.moe_layers())
    found, by_kernels = engine.generate(requests)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    assert by_kernels.branches == by_reference.branches

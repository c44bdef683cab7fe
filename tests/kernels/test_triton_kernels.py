"""The Triton kernels against their references, in Triton's interpreter on CPU: ragged, empty and unaligned shapes.

Shape suffixes: S source rows, D hidden size, R rows, T tokens, B images, N branches, M fresh branches.
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

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.cache.storage import Packed
from moeca_dist.config import Config, load_config
from moeca_dist.kernels import select
from moeca_dist.kernels.reference import REFERENCE
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

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([1, 7, 16, 40, 65])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def in_triton() -> Kernels:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a CUDA device the kernels are compiled; tests/kernels/test_gpu.py has them in whole networks")
    return kernels_of("triton", torch.device("cpu"))


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE.get(expected.dtype, 0)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance * 4, rtol=tolerance)


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 9), WIDTHS, DTYPES, st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_gather_rows(
    in_triton: Kernels, rows: int, sources: int, experts: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Any counts, experts without rows, and source rows that are slices of wider ones: bit for bit."""
    draw = torch.Generator().manual_seed(seed)
    x_SD = torch.randn(sources, width + 3, generator=draw).to(dtype)[:, 3:]
    source_R = torch.randint(0, sources, (rows,), generator=draw)
    expert_R = torch.randint(0, experts, (rows,), generator=draw)
    found, expected = (each.gather_rows(x_SD, source_R, expert_R, experts) for each in (in_triton, REFERENCE))
    assert torch.equal(found.rows_RD, expected.rows_RD)
    assert torch.equal(found.counts_L, expected.counts_L) and torch.equal(found.position_R, expected.position_R)


def make_branches(
    tokens: int, most: int, width: int, dtype: torch.dtype, forecast: bool, draw: Any
) -> tuple[StoredBranches, BranchesToServe, FreshRows]:
    """Tokens with up to ``most`` branches each, in some rows of a cache that has more."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    per_token_T = torch.randint(0, most + 1, (tokens,), generator=draw)
    count = int(per_token_T.sum())
    values, slopes = (Packed(normal(count + 3, width), None, dtype) for _ in range(2))
    step_N = torch.randint(0, 5, (count + 3,), generator=draw, dtype=torch.int32)
    found_N = torch.rand(count, generator=draw) < 0.7
    refresh_N = (torch.rand(count, generator=draw) < 0.3) | ~found_N
    branches = BranchesToServe(
        torch.arange(tokens).repeat_interleave(per_token_T), per_token_T.cumsum(0) - per_token_T,
        torch.rand(count, generator=draw), torch.randperm(count + 3, generator=draw)[:count], found_N, refresh_N,
    )  # fmt: skip
    branch_M = refresh_N.nonzero().squeeze(1)
    fresh = FreshRows(normal(len(branch_M), width), branch_M, torch.randperm(len(branch_M), generator=draw))
    return StoredBranches(values, slopes if forecast else None, step_N), branches, fresh


def copied(stored: StoredBranches) -> StoredBranches:
    def copy(packed: Any) -> Any:
        return None if packed is None else Packed(packed.data_XD.clone(), None, packed.dtype)

    return StoredBranches(copy(stored.values_ND), copy(stored.slopes_ND), stored.step_N.clone())


SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 4), WIDTHS, DTYPES, st.booleans())


@given(SHAPES, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_serve_branches(in_triton: Kernels, shape: Any, seed: int) -> None:
    """The sums, and what is stored afterwards: values bit for bit, slopes to rounding, and who was stored when."""
    tokens, most, width, dtype, forecast = shape
    made = make_branches(tokens, most, width, dtype, forecast, torch.Generator().manual_seed(seed))
    here, there = copied(made[0]), copied(made[0])
    found, expected = in_triton.serve_branches(here, *made[1:], 7), REFERENCE.serve_branches(there, *made[1:], 7)
    close(found, expected)
    assert torch.equal(here.values_ND.unpack(), there.values_ND.unpack())
    assert torch.equal(here.step_N, there.step_N)
    if here.slopes_ND is not None and there.slopes_ND is not None:
        close(here.slopes_ND.unpack(), there.slopes_ND.unpack())


@given(st.integers(0, 3), st.integers(1, 5), WIDTHS, DTYPES, st.integers(0, 3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_residual(
    in_triton: Kernels, images: int, tokens: int, width: int, dtype: torch.dtype, order: int, by_row: bool, seed: int
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
    for kernels, outputs in ((in_triton, found), (REFERENCE, expected)):
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


def test_the_name_chooses_whatever_the_device(tmp_path: Path) -> None:
    assert all(kernels_of("torch", torch.device(kind)) is REFERENCE for kind in ("cpu", "cuda"))
    (tmp_path / "run.yaml").write_text("model: {kernels: cuda}")
    with pytest.raises(UserError, match=r"model\.kernels must be 'torch' or 'triton'"):
        load_config(tmp_path / "run.yaml")


def refusal(device: str) -> str:
    with pytest.raises(UserError) as caught:
        kernels_of("triton", torch.device(device))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_run_is_rein_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "needs a CUDA device, not cpu" in refusal("cpu")
    monkeypatch.setattr(select, "find_spec", lambda name: None)
    assert "Triton is not installed" in refusal("cuda")


@pytest.mark.parametrize("policy", ["moeca_forecast", "taylorseer", "random"])
def test_whole_networks(in_triton: Kernels, policy: str, tmp_path: Path) -> None:
    """Every kernel where ``model.kernels`` puts it, with full, served and mixed steps: the images of the references."""
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path / "model.safetensors")
    halves = {"conditional": [0, 1, 3], "unconditional": [0, 1]}
    requests = [Request(index, index) for index in range(2)]

    def generate(kernels: str) -> tuple[Any, Report]:
        values = {
            "model": {"checkpoint": str(path), "device": "cpu", "kernels": kernels, **golden.options},
            "cache": {"policy": policy, "full_steps": halves},
            "sampling": {"num_steps": 5},
        }
        return Engine.from_config(Config.model_validate(values)).generate(requests)

    (expected, by_reference), (found, by_kernels) = generate("torch"), generate("triton")
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    assert by_kernels.branches == by_reference.branches

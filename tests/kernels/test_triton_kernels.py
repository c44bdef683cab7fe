"""The Triton kernels against their references, in Triton's interpreter on CPU: ragged, empty and unaligned shapes.

Shape suffixes: S source rows, D hidden size, R rows, T tokens, K routed experts and entries per token,
B images, E experts, N branches.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist import Engine, Request
from moeca_dist.cache.storage import Packed
from moeca_dist.config import Config
from moeca_dist.kernels import select
from moeca_dist.kernels.int8_rows import FORMATS, SCALE_BYTES, RowFormat
from moeca_dist.kernels.reference import ReferenceKernels
from moeca_dist.kernels.select import kernels_for
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    HeldRows,
    Kernels,
    RouterWeights,
    StoredBranches,
)
from tests.helpers.golden_files import load_golden

REFERENCE = ReferenceKernels()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
CODED_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
WIDTHS = st.sampled_from([1, 7, 16, 40, 65])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def fused() -> Kernels:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a CUDA device the kernels are compiled; tests/test_gpu.py has them in whole networks")
    from moeca_dist.kernels.fused import FusedKernels

    return FusedKernels()


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE.get(expected.dtype, 0)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance * 4, rtol=tolerance)


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 9), WIDTHS, DTYPES, st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_gather_rows(
    fused: Kernels, rows: int, sources: int, experts: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Any counts, experts without rows, and source rows that are slices of wider ones: bit for bit."""
    draw = torch.Generator().manual_seed(seed)
    x_SD = torch.randn(sources, width + 3, generator=draw).to(dtype)[:, 3:]
    source_R = torch.randint(0, sources, (rows,), generator=draw)
    expert_R = torch.randint(0, experts, (rows,), generator=draw)
    found, expected = (each.gather_rows(x_SD, source_R, expert_R, experts) for each in (fused, REFERENCE))
    assert torch.equal(found.rows_RD, expected.rows_RD)
    assert torch.equal(found.counts_L, expected.counts_L) and torch.equal(found.position_R, expected.position_R)


def make_branches(
    tokens: int, k: int, width: int, dtype: torch.dtype, forecast: bool, draw: Any
) -> tuple[StoredBranches, BranchesToServe, FreshRows]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    values, slopes = (Packed(normal(tokens, k, width), None, dtype) for _ in range(2))
    steps_TK = torch.randint(0, 5, (tokens, k), generator=draw, dtype=torch.int32)
    entry_TK = torch.rand(tokens, k, generator=draw).argsort(-1)
    found_TK = torch.rand(tokens, k, generator=draw) < 0.7
    refresh_TK = (torch.rand(tokens, k, generator=draw) < 0.3) | ~found_TK
    gates_TK = torch.rand(tokens, k, generator=draw)
    branch_N = refresh_TK.flatten().nonzero().squeeze(1)
    row_N = torch.randperm(len(branch_N), generator=draw)
    stored = StoredBranches(values, slopes if forecast else None, steps_TK)
    fresh = FreshRows(normal(len(branch_N), width), branch_N, row_N)
    return stored, BranchesToServe(gates_TK, entry_TK, found_TK, refresh_TK), fresh


def copied(stored: StoredBranches) -> StoredBranches:
    def copy(packed: Any) -> Any:
        return None if packed is None else Packed(packed.data_XD.clone(), None, packed.dtype)

    return StoredBranches(copy(stored.values_TKD), copy(stored.slopes_TKD), stored.steps_TK.clone())


SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 4), WIDTHS, DTYPES, st.booleans())


@given(SHAPES, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_serve_branches(fused: Kernels, shape: Any, seed: int) -> None:
    """The sums, and what is stored afterwards: values bit for bit, slopes to rounding, and who was stored when."""
    tokens, k, width, dtype, forecast = shape
    made = make_branches(tokens, k, width, dtype, forecast, torch.Generator().manual_seed(seed))
    here, there = copied(made[0]), copied(made[0])
    found, expected = fused.serve_branches(here, *made[1:], 7), REFERENCE.serve_branches(there, *made[1:], 7)
    close(found, expected)
    assert torch.equal(here.values_TKD.unpack(), there.values_TKD.unpack())
    assert torch.equal(here.steps_TK, there.steps_TK)
    if here.slopes_TKD is not None and there.slopes_TKD is not None:
        close(here.slopes_TKD.unpack(), there.slopes_TKD.unpack())


@given(st.integers(0, 3), st.integers(1, 5), WIDTHS, DTYPES, st.integers(0, 3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_residual(
    fused: Kernels, images: int, tokens: int, width: int, dtype: torch.dtype, order: int, by_row: bool, seed: int
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
    for kernels, outputs in ((fused, found), (REFERENCE, expected)):
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


def scores_of(x_TD: Tensor, router: RouterWeights) -> Tensor:
    if router.scoring == "sigmoid":
        return (x_TD.float() @ router.weight_ED.float().T).sigmoid()
    return (x_TD @ router.weight_ED.T).softmax(-1)


@given(
    st.integers(0, 40), st.sampled_from([1, 16, 70]), st.integers(1, 17), st.integers(1, 5), DTYPES,
    st.sampled_from(["sigmoid", "softmax"]), st.booleans(), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
@example(5, 1, 16, 1, torch.bfloat16, "sigmoid", False, False, 1)  # two experts have the same weights
@settings(max_examples=40, deadline=None)
def test_route(
    fused: Kernels, tokens: int, width: int, experts: int, k: int, dtype: torch.dtype, scoring: Any,
    biased: bool, normalised: bool, seed: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    k = min(k, experts)
    router = RouterWeights(
        torch.randn(experts, width, generator=draw).to(dtype),
        torch.rand(experts, generator=draw) if biased else None, k, scoring, normalised, 2.5,
    )  # fmt: skip
    x_TD = torch.randn(tokens, width, generator=draw).to(dtype)
    stored_ids_TK = torch.rand(tokens, experts, generator=draw).argsort(-1)[:, :k].contiguous()
    found, expected = (each.route(x_TD, router, stored_ids_TK) for each in (fused, REFERENCE))
    # Equal scores may be chosen in any order, but none that is lower.
    scores_TE = scores_of(x_TD, router)
    choice_TE = scores_TE + (router.bias_E if router.bias_E is not None else 0.0)
    ranked_TE = choice_TE.sort(-1, descending=True).values
    chosen_TK = choice_TE.gather(1, found.expert_ids_TK).sort(-1, descending=True).values
    close(*(scores_TK.to(scores_TE.dtype) for scores_TK in (chosen_TK, ranked_TE[:, :k])))
    same_T = (found.expert_ids_TK.sort(-1).values == expected.expert_ids_TK.sort(-1).values).all(-1)
    if experts == k:
        assert same_T.all()
    elif scores_TE.dtype == torch.float32:
        # A saturated sigmoid gives ties by the dozen, and so do weights of low precision.
        assert same_T[ranked_TE[:, k - 1] - ranked_TE[:, k] > 1e-5].all()
    else:
        # Scores themselves are rounded: two steps apart are clear.
        clear_T = ranked_TE[:, k - 1] - ranked_TE[:, k] > 2 * torch.finfo(dtype).eps * ranked_TE[:, k - 1].abs()
        assert same_T[clear_T].float().mean() >= 0.8 or clear_T.sum() < 5
    same_T = (found.expert_ids_TK == expected.expert_ids_TK).all(-1)
    close(found.gates_TK[same_T], expected.gates_TK[same_T])
    assert torch.equal(found.found_TK[same_T], expected.found_TK[same_T])
    assert torch.equal(found.entry_TK[same_T], expected.entry_TK[same_T])
    assert all(len(set(entry)) == k for entry in found.entry_TK.tolist())


FORMS = st.sampled_from(sorted(FORMATS))


@given(FORMS, CODED_DTYPES, st.integers(0, 9), WIDTHS, st.booleans(), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_coded_rows(
    fused: Kernels, name: str, dtype: torch.dtype, rows: int, width: int, holds: bool, broken: bool, seed: int
) -> None:
    """Four exchanges of rows that change little: codes as the reference makes them, and both ends hold the same bits.

    Rows are slices, codes unaligned, and some rows have infinities and NaN, or are zero.
    """
    form, draw = FORMATS[name], torch.Generator().manual_seed(seed)

    def end() -> HeldRows:
        return HeldRows(torch.zeros(rows + 3, width, dtype=dtype), torch.randperm(rows + 3, generator=draw)[:rows])

    sender, receiver = (end() if holds else None for _ in range(2))
    wide_ND = torch.randn(rows, width + 3, generator=draw)
    for turn in range(4):
        wide_ND = wide_ND + 0.1 * torch.randn(rows, width + 3, generator=draw)
        rows_ND = wide_ND.to(dtype)[:, 3:]
        if broken and turn == 1 and rows:
            rows_ND[0] = 0
            rows_ND[rows // 2, seed % width] = (torch.nan, torch.inf, -torch.inf)[seed % 3]
        reference = None if sender is None else HeldRows(sender.rows_SD.clone(), sender.key_N)
        coded_NW = fused.encode_rows(rows_ND, sender, form)
        finite_N = rows_ND.isfinite().all(1)
        # What codes a row without a scale has is moot.
        alike(coded_NW[finite_N], REFERENCE.encode_rows(rows_ND, reference, form)[finite_N], form)
        packed = torch.cat([torch.zeros(rows, 3, dtype=torch.uint8), coded_NW], 1)[:, 3:]
        decoded_ND = fused.decode_rows(packed, receiver, form, width, dtype)
        assert decoded_ND.dtype == dtype and decoded_ND[~finite_N].isnan().all()
        # Half a code of a whole row, or three bits of mantissa of the largest value.
        most_N1 = rows_ND.float().abs().amax(1, keepdim=True)
        error_ND = (decoded_ND.float() - rows_ND.float()).abs()
        rounding_ND = torch.finfo(dtype).eps * rows_ND.float().abs()
        assert (error_ND <= 1.01 * most_N1 / (254 if name == "int8" else 16) + rounding_ND)[finite_N].all()
        if sender is not None and receiver is not None:
            held_ND = sender.rows_SD[sender.key_N]
            assert torch.equal(held_ND, receiver.rows_SD[receiver.key_N])
            assert torch.equal(held_ND, decoded_ND.nan_to_num(0.0, 0.0, 0.0))


def alike(found_NW: Tensor, expected_NW: Tensor, form: RowFormat) -> None:
    """The same scales to rounding, and codes next to each other where a value lies between two of them."""
    both = found_NW, expected_NW
    scales, codes = [each[:, :SCALE_BYTES] for each in both], [each[:, SCALE_BYTES:] for each in both]
    found_N, expected_N = (each.flatten().view(torch.float32) for each in scales)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-6, atol=0)
    if form.dtype.is_floating_point:  # ascending, as numbers of one sign and their bits are
        found, expected = (torch.where(each >= 128, 128 - each.int(), each.int()) for each in codes)
    else:
        found, expected = (each.contiguous().view(torch.int8).int() for each in codes)
    apart = (found - expected).abs()
    assert (apart <= 1).all() and apart.sum() <= 1 + 0.02 * apart.numel()


def test_e4m3_by_its_bits(fused: Kernels) -> None:
    """Every code, and what lies between two of them: as PyTorch rounds, ties to even."""
    form = FORMATS["fp8"]
    codes = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127]
    values = codes.view(torch.float8_e4m3fn).float().sort().values
    between = torch.cat([values[:-1] + share * values.diff() for share in (0.0, 0.25, 0.4999, 0.5, 0.5001, 0.75)])
    # The largest value gets the largest code, so the scale is 1.
    rows_ND = torch.cat([between, torch.tensor([448.0])])[None]
    coded_NW = fused.encode_rows(rows_ND, None, form)
    assert torch.equal(coded_NW[0, SCALE_BYTES:], rows_ND[0].to(torch.float8_e4m3fn).view(torch.uint8))
    decoded_ND = fused.decode_rows(coded_NW, None, form, rows_ND.shape[1], torch.float32)
    assert torch.equal(decoded_ND, rows_ND.to(torch.float8_e4m3fn).float())


def test_the_device_chooses() -> None:
    assert type(kernels_for(torch.device("cpu"))) is ReferenceKernels


@pytest.mark.parametrize("policy", ["moeca_forecast", "taylorseer", "random"])
def test_whole_networks(fused: Kernels, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel where it runs on a GPU, with full, served and mixed steps: the images of the references."""
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path / "model.safetensors")
    halves = {"conditional": [0, 1, 3], "unconditional": [0, 1]}
    config = Config.model_validate(
        {
            "model": {"checkpoint": str(path), "device": "cpu", **golden.options},
            "cache": {"policy": policy, "full_steps": halves},
            "sampling": {"num_steps": 5},
        }
    )
    engine = Engine.from_config(config)
    requests = [Request(index, index) for index in range(2)]
    expected, by_reference = engine.generate(requests)
    monkeypatch.setattr(select, "_plain", lambda: fused)
    found, by_kernels = engine.generate(requests)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    assert by_kernels.branches == by_reference.branches

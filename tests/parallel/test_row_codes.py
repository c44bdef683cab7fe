"""Rows as codes: round trips, what a change is worth, and that sender and receiver never drift apart.

Shape suffixes: N rows, D hidden size.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moeca_dist.parallel.references import Places, References, RowCoding
from torch import Tensor

from moeca_dist.kernels.int8_rows import FORMATS, SCALE_BYTES, RowFormat, decode, encode

NAMES = pytest.mark.parametrize("name", FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 24


def rows_of(num_rows: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some with an outlier, so that a row's largest value says little of the others."""
    draw = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(num_rows, WIDTH, generator=draw)
    rows_ND[::3, 0] *= 20
    return (rows_ND * scale).to(dtype)


def naive(row: list[float], reference: list[float] | None, form: RowFormat) -> list[float]:
    """One row, value by value, in fp32."""
    change = None if reference is None else [a - b for a, b in zip(row, reference, strict=True)]
    by_change = change is not None and max(map(abs, change)) < max(map(abs, row))
    values = torch.tensor(change if by_change else row)
    scale = values.abs().max() / form.largest
    decoded = []
    for index, value in enumerate(values):
        code = (value / scale).round() if form.dtype == torch.int8 else (value / scale).to(form.dtype).float()
        base = torch.tensor(reference[index] if by_change and reference is not None else 0.0)
        decoded.append((code * scale + base).item())
    return decoded


@NAMES
@given(num_rows=st.integers(0, 7), seed=st.integers(0, 999), known=st.sampled_from([None, 0.01, 1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_codes_match_the_loop(name: str, num_rows: int, seed: int, known: float | None) -> None:
    """``known``: how far the reference is from the row; the far ones are of no use."""
    form, rows_ND = FORMATS[name], rows_of(num_rows, seed)
    reference_ND = None if known is None else rows_ND + known * rows_of(num_rows, seed + 1)
    coded_NW = encode(rows_ND, reference_ND, form)
    assert coded_NW.shape == (num_rows, SCALE_BYTES + WIDTH) and coded_NW.dtype == torch.uint8
    decoded_ND = decode(coded_NW, reference_ND, form, torch.float32)
    references = [None] * num_rows if reference_ND is None else reference_ND.tolist()
    expected = [naive(row, reference, form) for row, reference in zip(rows_ND.tolist(), references, strict=True)]
    torch.testing.assert_close(decoded_ND, torch.tensor(expected).view(num_rows, WIDTH), rtol=1e-6, atol=1e-6)


@NAMES
@given(seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), exponent=st.integers(-30, 4))
@settings(max_examples=40, deadline=None)
def test_the_error_is_that_of_one_code(name: str, seed: int, dtype: torch.dtype, exponent: int) -> None:
    """int8: half a step of the largest value. e4m3: a 16th of the value, or half its smallest step."""
    form, rows_ND = FORMATS[name], rows_of(6, seed, 2.0**exponent, dtype)
    decoded_ND = decode(encode(rows_ND, None, form), None, form, dtype)
    assert decoded_ND.dtype == dtype
    exact_ND, largest_N1 = rows_ND.double(), rows_ND.double().abs().amax(1, keepdim=True)
    bound_ND = largest_N1 / 254
    if name == "fp8":
        bound_ND = torch.maximum(exact_ND.abs() / 16, largest_N1 / 448 * 2**-10)
    rounding_ND = exact_ND.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert ((decoded_ND.double() - exact_ND).abs() <= bound_ND * (1 + 1e-5) + rounding_ND).all()


@NAMES
def test_a_small_change_is_worth_many_bits(name: str) -> None:
    form, rows_ND = FORMATS[name], rows_of(50, 1)
    near_ND = rows_ND + 0.01 * rows_of(50, 2)

    def error(reference_ND: Tensor | None) -> float:
        return (decode(encode(rows_ND, reference_ND, form), reference_ND, form, torch.float32) - rows_ND).norm().item()

    assert error(near_ND) < error(None) / 30
    # What is farther away than nothing does no harm: the same bytes.
    far_ND = rows_ND + 500 * rows_of(50, 3)
    assert torch.equal(encode(rows_ND, far_ND, form), encode(rows_ND, None, form))


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_extremes(name: str, dtype: torch.dtype) -> None:
    form, largest = FORMATS[name], torch.finfo(dtype).max * (1.0 if dtype == torch.float16 else 0.9)
    rows_ND = torch.stack([torch.zeros(WIDTH), torch.full((WIDTH,), 1e-40), torch.full((WIDTH,), largest)]).to(dtype)
    for reference_ND in (None, rows_of(3, 1, dtype=dtype), -rows_ND, rows_ND):
        decoded_ND = decode(encode(rows_ND, reference_ND, form), reference_ND, form, dtype)
        assert decoded_ND.isfinite().all() and not decoded_ND[0].any() and decoded_ND[1].abs().max() <= 1e-37
        torch.testing.assert_close(decoded_ND[2], rows_ND[2], rtol=1e-2, atol=0)


@NAMES
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_breaks_itself_alone(name: str, broken: float) -> None:
    """It arrives as NaN, not as something plausible; the next row of the pair does not need it."""
    sender, receiver = References(FORMATS[name], 3), References(FORMATS[name], 3)
    key_N = torch.tensor([2, 0, 1])
    for step in range(4):
        rows_ND = rows_of(3, 1) + 0.01 * step
        if step == 1:
            rows_ND[1, 5] = broken
        arrived_ND = receiver.decode(sender.encode(rows_ND, key_N), key_N, WIDTH, torch.float32)
        assert arrived_ND[[0, 2]].isfinite().all()
        assert arrived_ND[1].isnan().all() if step == 1 else arrived_ND[1].isfinite().all()
        if step == 2:  # by itself
            coded_NW = encode(rows_ND[1:2], None, FORMATS[name])
            assert torch.equal(arrived_ND[1:2], decode(coded_NW, None, FORMATS[name], torch.float32))


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_do_not_add_up(name: str, dtype: torch.dtype) -> None:
    """A random walk of 100 steps: each error is within a code of that step's change, however long the walk is."""
    form = FORMATS[name]
    sender, receiver = References(form, 20), References(form, 20)
    key_N, walk_ND = torch.arange(20), rows_of(20, 0)
    before_ND = arrived_ND = open_loop_ND = torch.zeros(20, WIDTH)
    for step in range(100):
        walk_ND = walk_ND + 0.05 * rows_of(20, step + 1)
        rows_ND = walk_ND.to(dtype)
        change_N = (rows_ND.float() - arrived_ND.float()).abs().amax(1)
        arrived_ND = receiver.decode(sender.encode(rows_ND, key_N), key_N, WIDTH, dtype)
        assert sender.rows_ND is not None and receiver.rows_ND is not None
        assert torch.equal(sender.rows_ND, receiver.rows_ND) and sender.rows_ND.dtype == dtype
        rounding_N = rows_ND.float().abs().amax(1) * torch.finfo(dtype).eps
        error_N = (arrived_ND.float() - rows_ND.float()).abs().amax(1)
        assert (error_N <= change_N / (254 if name == "int8" else 16) * 1.001 + rounding_N).all()
        # The same codes, of changes against the row sent before: what is wrong stays wrong.
        change_ND = walk_ND - before_ND
        open_loop_ND = open_loop_ND + decode(encode(change_ND, None, form), None, form, torch.float32)
        before_ND = walk_ND
    if dtype == torch.float32:
        assert (open_loop_ND - walk_ND).norm() > 4 * (arrived_ND - walk_ND).norm()


@given(st.lists(st.integers(0, 5), min_size=2, max_size=5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_places_are_shared_by_nobody(images: list[int], halves_apart: bool) -> None:
    """Of all ranks, pairs and slots each has a place of its own, at home as at the owner, within the tensors."""
    per_image, device = 3, torch.device("cpu")
    form = FORMATS["int8"]
    codings = [RowCoding(Places.of(form, rank, images, per_image, device)).block(1) for rank in range(len(images))]
    at_owner: dict[int, list[int]] = {owner: [] for owner in range(len(images))}
    for rank, coding in enumerate(codings):
        at_home: list[int] = []
        for owner in set(range(len(images))) - {rank}:
            parts = [slice(0, images[rank] // 2), slice(images[rank] // 2, images[rank])]
            for part in parts if halves_apart else [slice(None)]:
                mine = coding.of_images(part)
                tokens = len(range(images[rank])[part]) * per_image
                token_M, owner_M = torch.arange(tokens), torch.full((tokens,), owner)
                at_home += mine.home_keys(token_M, owner_M).tolist()
                at_owner[owner] += mine.owner_keys(token_M, owner_M).tolist()
        assert sorted(at_home) == list(range(coding.places.num_at_home))
    for owner, keys in at_owner.items():
        assert sorted(keys) == list(range(codings[owner].places.num_at_owner))


def test_single_images_have_the_places_that_they_have_in_the_batch() -> None:
    coding = RowCoding(Places.of(FORMATS["fp8"], 1, [4, 6, 2], 3, torch.device("cpu")))
    token_M, owner_M = torch.arange(6), torch.full((6,), 2)

    def keys(at: RowCoding) -> list[int]:
        return at.block(0).owner_keys(token_M, owner_M).tolist()

    assert keys(coding.of_images(torch.tensor([1, 5]))) == [15, 16, 17, 27, 28, 29]
    assert keys(coding.of_images(slice(3, 5))) == list(range(21, 27))
    assert keys(coding.of_images(slice(None))) == keys(coding) == list(range(12, 18))
    first_N = torch.tensor([0])
    assert coding.block(0).of_tokens(torch.tensor([17])).home_keys(first_N, first_N).tolist() == [17]
    assert coding.num_bytes == 0


@NAMES
@pytest.mark.parametrize("use", [lambda rows: rows[:0], lambda rows: rows])
def test_references_are_made_with_the_first_rows(name: str, use: Callable[[Tensor], Tensor]) -> None:
    references = References(FORMATS[name], 5)
    rows_ND = use(rows_of(2, 1))
    assert references.num_bytes == 0
    references.encode(rows_ND, torch.tensor([4, 1])[: len(rows_ND)])
    assert references.num_bytes == 5 * WIDTH * 4

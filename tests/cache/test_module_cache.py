"""Attention and module outputs refreshed row by row.

Shape suffixes: B images, T tokens of one image, D hidden size, N rows.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_dist.cache.module_cache import KeyValueCache, RowCache, Rows
from moeca_dist.models.attention import Attention, NormedSelfAttention, SelfAttention, merge_heads, mix, rotary_table

HIDDEN, HEADS, SIDE = 24, 3, 3
TOKENS = SIDE * SIDE


@pytest.mark.parametrize("kind", [SelfAttention, NormedSelfAttention])
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_against_fresh_keys_and_values_are_the_rows_of_full_attention(
    kind: type[Attention], rotated: bool
) -> None:
    module = kind(HIDDEN, HEADS)
    draw = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, TOKENS, HIDDEN, generator=draw)
    rotary = rotary_table(SIDE, SIDE, HIDDEN // HEADS, torch.device("cpu")) if rotated else None
    rows = Rows(torch.tensor([0, 4, 5, TOKENS + 2]), TOKENS)
    with torch.no_grad():
        expected_BTD = module(x_BTD, rotary)
        # The stored keys and values of the rows are stale, those of the others are fresh.
        _, keys, values = module.project(x_BTD, rotary)
        kept = KeyValueCache()
        stale_BHTC = keys.clone()
        stale_BHTC[rows.image_N, :, rows.position_N] = 7.0
        kept.store(stale_BHTC, values)
        kept.store_rows(rows, *torch.full((2, HEADS, 4, HIDDEN // HEADS), 7.0))
        x_ND = x_BTD[rows.image_N, rows.position_N]
        table = None if rotary is None else rotary.at(rows.position_N)
        q_HNC, k_HNC, v_HNC = (part[0] for part in module.project(x_ND[None], table))
        kept.store_rows(rows, k_HNC, v_HNC)
        for found, all_fresh in zip(kept.read(rows, k_HNC, v_HNC), (keys, values), strict=True):
            torch.testing.assert_close(found, all_fresh)
        mixed = [
            merge_heads(mix(q_HNC[None, :, rows.image_N == image], keys[image, None], values[image, None]))[0]
            for image in range(2)
        ]
        found_ND = module.output(torch.cat(mixed))
    torch.testing.assert_close(found_ND, expected_BTD[rows.image_N, rows.position_N])


def test_rows_within_a_segment() -> None:
    rows = Rows(torch.tensor([1, 3, 4, 9, 10]), 4)
    assert rows.image_N.tolist() == [0, 0, 1, 2, 2] and rows.position_N.tolist() == [1, 3, 0, 1, 2]
    window, mine = rows.within(slice(1, 3))
    assert window == slice(2, 5) and mine.flat_N.tolist() == [0, 5, 6]
    window, mine = rows.within(slice(3, 3))
    assert window == slice(5, 5) and mine.flat_N.tolist() == []


@given(data=st.data(), order=st.integers(0, 1), gaps=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_rows_stored_on_their_own_forecast_from_their_own_last_values(data, order: int, gaps: list[int]) -> None:
    """Two images of two tokens against a list of (step, value) for each token."""
    cache, history = RowCache(order), [[] for _ in range(4)]
    draw = torch.Generator().manual_seed(sum(gaps))
    step = 0
    for gap in [0, *gaps]:
        step += gap
        values = torch.randn(4, 3, generator=draw)
        every = list(range(4))
        chosen = every if not gap or data.draw(st.booleans()) else sorted(data.draw(st.sets(st.sampled_from(every))))
        if chosen == every:
            cache.store(values.view(2, 2, 3).clone(), step)
        else:
            cache.store_rows(Rows(torch.tensor(chosen, dtype=torch.int64), 2), values[chosen], step)
        for token in chosen:
            history[token].append((step, values[token]))
        ahead = step + data.draw(st.integers(0, 3))
        out = torch.empty(2, 2, 3)
        cache.forecast_into(out, ahead)
        for token, seen in enumerate(history):
            (last_step, expected) = seen[-1]
            if order and len(seen) > 1:
                expected = expected + (expected - seen[-2][1]) / (last_step - seen[-2][0]) * (ahead - last_step)
            torch.testing.assert_close(out.view(4, 3)[token], expected, atol=1e-4, rtol=1e-4)
            assert cache.age_BT(ahead).flatten()[token] == ahead - last_step

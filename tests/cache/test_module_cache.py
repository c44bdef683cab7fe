"""Attention and module outputs refreshed token by token.

Shape suffixes: B images, T tokens of one image, D hidden size, N chosen tokens, H heads, C channels of a head.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_dist.cache.module_cache import KeyValueCache, ModuleCache, TokenIndex
from moeca_dist.models.attention import Attention, NormedSelfAttention, SelfAttention, rotary_table
from moeca_dist.models.attention_rows import attend_tokens

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
    tokens = TokenIndex(torch.tensor([0, 4, 5, TOKENS + 2]), TOKENS)
    with torch.no_grad():
        expected_BTD = module(x_BTD, rotary)
        # The stored keys and values of the rows are stale, those of the others are fresh.
        _, keys, values = module.project(x_BTD, rotary)
        kept = KeyValueCache()
        stale_BHTC = keys.clone()
        stale_BHTC[tokens.image_N, :, tokens.position_N] = 7.0
        kept.store(stale_BHTC, values)
        kept.refresh(tokens, *torch.full((2, HEADS, 4, HIDDEN // HEADS), 7.0))
        found_ND = attend_tokens(module, tokens.of(x_BTD), tokens, rotary, kept)
        table = None if rotary is None else rotary.at(tokens.position_N)
        _, k_HNC, v_HNC = (part[0] for part in module.project(tokens.of(x_BTD)[None], table))
        for found, all_fresh in zip(kept.refresh(tokens, k_HNC, v_HNC), (keys, values), strict=True):
            torch.testing.assert_close(found, all_fresh)
    torch.testing.assert_close(found_ND, expected_BTD[tokens.image_N, tokens.position_N])


def test_tokens_of_several_images() -> None:
    tokens = TokenIndex(torch.tensor([1, 3, 4, 9, 10]), 4)
    assert tokens.image_N.tolist() == [0, 0, 1, 2, 2] and tokens.position_N.tolist() == [1, 3, 0, 1, 2]
    assert tokens.of(torch.arange(12).view(3, 4, 1)).flatten().tolist() == [1, 3, 4, 9, 10]


@given(data=st.data(), order=st.integers(0, 1), gaps=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_rows_stored_on_their_own_forecast_from_their_own_last_values(data, order: int, gaps: list[int]) -> None:
    """Two images of two tokens against a list of (step, value) for each token."""
    cache, history = ModuleCache(order), [[] for _ in range(4)]
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
            cache.store_tokens(TokenIndex(torch.tensor(chosen, dtype=torch.int64), 2), values[chosen], step)
        for token in chosen:
            history[token].append((step, values[token]))
        ahead = step + data.draw(st.integers(0, 3))
        out = cache.forecast(ahead).sum()
        for token, seen in enumerate(history):
            (last_step, expected) = seen[-1]
            if order and len(seen) > 1:
                expected = expected + (expected - seen[-2][1]) / (last_step - seen[-2][0]) * (ahead - last_step)
            torch.testing.assert_close(out.view(4, 3)[token], expected, atol=1e-4, rtol=1e-4)
            assert cache.age_BT(ahead).flatten()[token] == ahead - last_step

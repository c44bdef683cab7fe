"""The branch cache against a dictionary of histories.

Shape suffixes: T tokens, K routed experts per token, D hidden size.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist.cache.branch_cache import BranchCache, Match
from moeca_dist.cache.module_cache import RowCache
from moeca_dist.kernels.types import FreshRows
from moeca_dist.types import Routing

EXPERTS, K, HIDDEN = 5, 2, 3


class DictCache:
    """(token, expert) -> the (step, value) pairs computed so far, of the experts that the token is routed to now."""

    def __init__(self, tokens: int) -> None:
        self.history: list[dict[int, list[tuple[int, Tensor]]]] = [{} for _ in range(tokens)]

    def step(self, step: int, ids_TK: Tensor, refresh_TK: Tensor, fresh_TKD: Tensor) -> None:
        for token, ids in enumerate(ids_TK.tolist()):
            self.history[token] = {expert: self.history[token].get(expert, []) for expert in ids}
            for slot, expert in enumerate(ids):
                if refresh_TK[token, slot]:
                    self.history[token][expert].append((step, fresh_TKD[token, slot]))

    def value(self, token: int, expert: int, step: int, forecast: bool) -> Tensor:
        seen = self.history[token][expert]
        last_step, last = seen[-1]
        if not forecast or len(seen) < 2:
            return last
        before_step, before = seen[-2]
        return last + (last - before) / (last_step - before_step) * (step - last_step)


def serve(
    cache: BranchCache, ids_TK: Tensor, gates_TK: Tensor, match: Match, refresh_TK: Tensor, fresh_TKD: Tensor, step: int
) -> Tensor:
    branch_N = refresh_TK.flatten().nonzero().squeeze(1)
    fresh = FreshRows(fresh_TKD.flatten(0, 1), branch_N, branch_N)
    return cache.serve(Routing(ids_TK, gates_TK), match, refresh_TK, fresh, step)


@given(
    data=st.data(),
    tokens=st.integers(0, 4),
    forecast=st.booleans(),
    gaps=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_matches_the_dictionary(data: st.DataObject, tokens: int, forecast: bool, gaps: list[int]) -> None:
    """Any routing, any choice of refreshed branches that covers the unmatched ones."""
    cache, naive = BranchCache(forecast=forecast), DictCache(tokens)
    draw = torch.Generator().manual_seed(len(gaps))
    step = 0
    for gap in [0, *gaps]:
        first, step = step == 0 and gap == 0, step + gap
        ids_TK = torch.tensor(
            [data.draw(st.permutations(range(EXPERTS)))[:K] for _ in range(tokens)], dtype=torch.int64
        ).reshape(tokens, K)
        gates_TK = torch.rand(tokens, K, generator=draw)
        fresh_TKD = torch.randn(tokens, K, HIDDEN, generator=draw)
        match = cache.match(ids_TK)
        expected_found = [
            [expert in naive.history[token] for expert in ids] for token, ids in enumerate(ids_TK.tolist())
        ]
        assert match.found_TK.tolist() == expected_found
        if first or data.draw(st.booleans()):
            refresh_TK = torch.ones(tokens, K, dtype=torch.bool)
            cache.store_all(ids_TK, fresh_TKD, match, step)
        else:
            chosen = data.draw(st.lists(st.booleans(), min_size=tokens * K, max_size=tokens * K))
            refresh_TK = ~match.found_TK | torch.tensor(chosen, dtype=torch.bool).reshape(tokens, K)
            served = serve(cache, ids_TK, gates_TK, match, refresh_TK, fresh_TKD, step)
            for token, ids in enumerate(ids_TK.tolist()):
                wanted = torch.zeros(HIDDEN)
                for slot, expert in enumerate(ids):
                    fresh_D = fresh_TKD[token, slot]
                    value_D = fresh_D if refresh_TK[token, slot] else naive.value(token, expert, step, forecast)
                    wanted += gates_TK[token, slot] * value_D
                torch.testing.assert_close(served[token], wanted, atol=1e-4, rtol=1e-4)
        naive.step(step, ids_TK, refresh_TK, fresh_TKD)


def test_an_expert_that_left_and_came_back_is_unmatched() -> None:
    routes = [torch.tensor([[0, 1]]), torch.tensor([[0, 2]]), torch.tensor([[1, 0]])]
    cache = BranchCache(forecast=False)
    for step, ids_TK in enumerate(routes):
        match = cache.match(ids_TK)
        if step == 2:
            assert match.found_TK.tolist() == [[False, True]]
        cache.store_all(ids_TK, torch.full((1, 2, HIDDEN), float(step)), match, step)


def test_slot_order_means_nothing() -> None:
    cache = BranchCache(forecast=False)
    values = torch.tensor([[[1.0] * HIDDEN, [10.0] * HIDDEN]])
    ids_TK = torch.tensor([[3, 1]])
    cache.store_all(ids_TK, values, cache.match(ids_TK), 0)
    swapped = torch.tensor([[1, 3]])
    gates_TK, nothing_TK = torch.tensor([[0.5, 2.0]]), torch.tensor([[False, False]])
    served = serve(cache, swapped, gates_TK, cache.match(swapped), nothing_TK, values, 1)
    assert served.tolist() == [[0.5 * 10 + 2.0 * 1] * HIDDEN]


def test_bytes_are_those_of_the_tensors() -> None:
    cache = BranchCache(forecast=True)
    assert cache.num_bytes == 0
    ids_TK = torch.tensor([[0, 1]] * 7)
    cache.store_all(ids_TK, torch.zeros(7, 2, HIDDEN), cache.match(ids_TK), 0)
    entries = 7 * 2
    assert cache.num_bytes == entries * (8 + 4) + 2 * entries * HIDDEN * 4


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_module_forecast_is_exact_for_polynomials_on_even_steps(order: int) -> None:
    """TaylorSeer's differences reproduce constants and lines exactly; its higher orders are one-sided differences."""
    rows = RowCache(order)
    for step in range(0, 20, 4):
        rows.store(torch.full((1, 2, 3), 3.0 + 0.5 * step), step)
    out = torch.empty(1, 2, 3)
    rows.forecast_into(out, 18)
    expected = 3.0 + 0.5 * (18 if order else 16)
    torch.testing.assert_close(out, torch.full((1, 2, 3), expected))
    assert rows.num_bytes == (order + 1) * 6 * 4

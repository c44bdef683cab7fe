"""The branch cache against a dictionary of histories, for top-k routing and for experts that choose their tokens.

Shape suffixes: T tokens, N branches, D hidden size.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist.cache.branch_cache import BranchCache, Match
from moeca_dist.cache.module_cache import ModuleCache
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.types import FreshRows
from moeca_dist.types import Routing

EXPERTS, HIDDEN = 5, 3


class DictCache:
    """(token, expert) -> the (step, value) pairs computed so far; forgets what the last routing did not name."""

    def __init__(self) -> None:
        self.history: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}

    def step(self, step: int, branches: list[tuple[int, int]], refresh: list[bool], fresh_ND: Tensor) -> None:
        self.history = {branch: seen for branch, seen in self.history.items() if branch in branches}
        for branch, is_fresh, value in zip(branches, refresh, fresh_ND, strict=True):
            if is_fresh:
                self.history.setdefault(branch, []).append((step, value))

    def value(self, branch: tuple[int, int], step: int, forecast: bool) -> Tensor:
        seen = self.history[branch]
        last_step, last = seen[-1]
        if not forecast or len(seen) < 2:
            return last
        before_step, before = seen[-2]
        return last + (last - before) / (last_step - before_step) * (step - last_step)


def new_cache(*, forecast: bool = False, scored: bool = False) -> BranchCache:
    return BranchCache(EXPERTS, REFERENCE, forecast=forecast, scored=scored)


def serve(cache: BranchCache, routing: Routing, match: Match, refresh_N: Tensor, fresh_ND: Tensor, step: int) -> Tensor:
    branch_N = refresh_N.nonzero().squeeze(1)
    return cache.serve(routing, match, refresh_N, FreshRows(fresh_ND, branch_N, branch_N), step)


def top_k(expert_ids: list[list[int]], gates: list[list[float]] | None = None) -> Routing:
    ids_TK = torch.tensor(expert_ids)
    return Routing.top_k(ids_TK, torch.ones(ids_TK.shape) if gates is None else torch.tensor(gates))


@st.composite
def routings(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """The branches of a first and some later routings of the same tokens, as many in each."""
    tokens = draw(st.integers(0, 5))
    chosen_by_experts = draw(st.booleans())
    size = draw(st.integers(0, tokens)) if chosen_by_experts else draw(st.integers(1, EXPERTS))
    found = []
    for _ in range(draw(st.integers(2, 6))):
        if chosen_by_experts:
            picks = [(token, e) for e in range(EXPERTS) for token in draw(st.permutations(range(tokens)))[:size]]
        else:
            picks = [(token, e) for token in range(tokens) for e in draw(st.permutations(range(EXPERTS)))[:size]]
        found.append(sorted(picks, key=lambda pick: pick[0]))
    return found


@given(data=st.data(), steps=routings(), forecast=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_matches_the_dictionary(
    data: st.DataObject, steps: list[list[tuple[int, int]]], forecast: bool, seed: int
) -> None:
    """Any routing, any choice of refreshed branches that covers the unmatched ones."""
    cache, naive, draw = new_cache(forecast=forecast), DictCache(), torch.Generator().manual_seed(seed)
    tokens = 1 + max((token for branches in steps for token, _ in branches), default=-1)
    step = 0
    for index, branches in enumerate(steps):
        step += 0 if index == 0 else data.draw(st.integers(1, 5))
        token_N = torch.tensor([token for token, _ in branches], dtype=torch.int64)
        expert_N = torch.tensor([expert for _, expert in branches], dtype=torch.int64)
        routing = Routing.listed(token_N, expert_N, torch.rand(len(branches), generator=draw), tokens)
        fresh_ND = torch.randn(len(branches), HIDDEN, generator=draw)
        match = cache.match(routing)
        assert match.found_N.tolist() == [branch in naive.history for branch in branches]
        assert sorted(match.row_N.tolist()) == list(range(len(branches)))
        if index == 0 or data.draw(st.booleans()):
            refresh_N = torch.ones(len(branches), dtype=torch.bool)
            cache.store_all(routing, match, fresh_ND, step)
        else:
            chosen = data.draw(st.lists(st.booleans(), min_size=len(branches), max_size=len(branches)))
            refresh_N = ~match.found_N | torch.tensor(chosen, dtype=torch.bool)
            expected_TD = torch.zeros(tokens, HIDDEN)
            for position, (token, expert) in enumerate(branches):
                fresh_D = fresh_ND[position]
                is_fresh = bool(refresh_N[position])
                value_D = fresh_D if is_fresh else naive.value((token, expert), step, forecast)
                expected_TD[token] += routing.gate_N[position] * value_D
            served_TD = serve(cache, routing, match, refresh_N, fresh_ND, step)
            torch.testing.assert_close(served_TD, expected_TD, atol=1e-4, rtol=1e-4)
        naive.step(step, branches, refresh_N.tolist(), fresh_ND)


@given(seed=st.integers(0, 1000), images=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_row_stays_with_its_image(seed: int, images: int) -> None:
    """Images have equal numbers of branches, so none of them gets the row of another."""
    draw = torch.Generator().manual_seed(seed)
    cache, tokens, k = new_cache(), 4 * images, 2
    for step in range(4):
        routing = Routing.top_k(torch.rand(tokens, EXPERTS, generator=draw).argsort(-1)[:, :k], torch.ones(tokens, k))
        match = cache.match(routing)
        image_of_row_N = match.row_N // (4 * k)
        assert torch.equal(image_of_row_N, routing.token_N // 4)
        cache.store_all(routing, match, torch.zeros(tokens * k, HIDDEN), step)


def test_an_expert_that_left_is_not_found_again() -> None:
    cache = new_cache()
    for step, experts in enumerate(([0, 1], [0, 2], [1, 0])):
        routing = top_k([experts])
        match = cache.match(routing)
        assert match.found_N.tolist() == [[False, False], [True, False], [False, True]][step]
        cache.store_all(routing, match, torch.full((2, HIDDEN), float(step)), step)


def test_slot_order_means_nothing() -> None:
    cache, values_ND = new_cache(), torch.tensor([[1.0] * HIDDEN, [10.0] * HIDDEN])
    first = top_k([[3, 1]])
    cache.store_all(first, cache.match(first), values_ND, 0)
    swapped = top_k([[1, 3]], [[0.5, 2.0]])
    served = serve(cache, swapped, cache.match(swapped), torch.tensor([False, False]), values_ND, 1)
    assert served.tolist() == [[0.5 * 10 + 2.0 * 1] * HIDDEN]


def test_bytes_are_those_of_the_tensors() -> None:
    cache = new_cache(forecast=True, scored=True)
    assert cache.num_bytes == 0
    routing = top_k([[0, 1]] * 7)
    cache.store_all(routing, cache.match(routing), torch.zeros(14, HIDDEN), 0)
    table, steps_gates_norms, values_slopes = 7 * EXPERTS * 4, 14 * (4 + 4 + 4), 2 * 14 * HIDDEN * 4
    assert cache.num_bytes == table + steps_gates_norms + values_slopes


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_module_forecast_is_exact_for_polynomials_on_even_steps(order: int) -> None:
    """TaylorSeer's differences reproduce constants and lines exactly; its higher orders are one-sided differences."""
    module = ModuleCache(order)
    for step in range(0, 20, 4):
        module.store(torch.full((1, 2, 3), 3.0 + 0.5 * step), step)
    expected = 3.0 + 0.5 * (18 if order else 16)
    torch.testing.assert_close(module.forecast(18).sum(), torch.full((1, 2, 3), expected))
    assert module.num_bytes == (order + 1) * 6 * 4

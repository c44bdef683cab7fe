"""Dispatch and combine against a loop over branches, on one rank and on several.

Shape suffixes: T tokens, N branches, D hidden size.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist.errors import UserError
from moeca_dist.moe.experts import RoutedExperts
from moeca_dist.parallel.all_to_all import BRANCH_HEADER_BYTES, SUM_HEADER_BYTES, AllToAllDispatcher
from moeca_dist.parallel.dispatcher import LocalDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.types import Routing

HIDDEN, WIDTH, EXPERTS = 8, 12, 6


def make_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    shapes = {"w1": (EXPERTS, WIDTH, HIDDEN), "w3": (EXPERTS, WIDTH, HIDDEN), "w2": (EXPERTS, HIDDEN, WIDTH)}
    return {name: torch.randn(*shape, generator=draw) * 0.3 for name, shape in shapes.items()}


def make_experts(owned: Sequence[int]) -> RoutedExperts:
    experts = RoutedExperts(HIDDEN, WIDTH, len(owned))
    experts.load_state_dict({name: weight[list(owned)] for name, weight in make_weights().items()})
    return experts.requires_grad_(False)


def make_input(num_tokens: int, routing: Sequence[Sequence[int]], seed: int) -> tuple[Tensor, Routing]:
    draw = torch.Generator().manual_seed(seed)
    k = len(routing[0]) if routing else 2
    ids = torch.tensor(routing, dtype=torch.int64).reshape(num_tokens, k)
    return torch.randn(num_tokens, HIDDEN, generator=draw), Routing.top_k(ids, torch.rand(ids.shape, generator=draw))


def naive(x_TD: Tensor, routing: Routing) -> Tensor:
    weights = make_weights()
    out = torch.zeros_like(x_TD)
    branches = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.gate_N.tolist(), strict=True)
    for token, expert, gate in branches:
        x = x_TD[token]
        gate_up = torch.nn.functional.silu(weights["w1"][expert] @ x) * (weights["w3"][expert] @ x)
        out[token] += gate * (weights["w2"][expert] @ gate_up)
    return out


def tokens_routing(max_tokens: int = 9, k: int = 2) -> st.SearchStrategy[list[list[int]]]:
    token = st.lists(st.integers(0, EXPERTS - 1), min_size=k, max_size=k, unique=True)
    return st.lists(token, min_size=0, max_size=max_tokens)


@given(tokens_routing())
@settings(max_examples=60, deadline=None)
def test_local_matches_the_loop(routing: list[list[int]]) -> None:
    x_TD, decided = make_input(len(routing), routing, 3)
    dispatcher = LocalDispatcher(EXPERTS)
    sent = dispatcher.dispatch(x_TD, decided.branches).wait()
    assert int(sent.rows_per_expert_L.sum()) == decided.expert_N.numel() == sent.rows_RD.shape[0]
    outputs_RD = make_experts(range(EXPERTS))(sent.rows_RD, sent.rows_per_expert_L)
    y_TD = dispatcher.combine_sums(outputs_RD, sent, decided).wait()
    torch.testing.assert_close(y_TD, naive(x_TD, decided), atol=1e-5, rtol=1e-5)
    assert torch.equal(y_TD, dispatcher.weighted_sum(dispatcher.combine(outputs_RD, sent).wait(), sent, decided))


def exchange_once(owners: tuple[int, ...], routings: list[list[list[int]]]) -> dict[str, object]:
    """Runs on every rank: its own tokens there and back, summed up by the owners and branch by branch."""
    env = LauncherEnv.read()
    mesh = Mesh.create(env, device_type="cpu", timeout_s=60)
    group = mesh.expert_group
    assert group is not None
    placement = ExpertPlacement(owners, env.world_size)
    dispatcher = AllToAllDispatcher(group, placement)
    experts = make_experts(placement.experts_of(env.rank))
    mine = routings[env.rank]
    x_TD, decided = make_input(len(mine), mine, 10 + env.rank)
    group.reset_traffic()
    dispatcher.count_exact(decided, x_TD)
    sent = dispatcher.dispatch(x_TD, decided.branches, decided.gate_N).wait()
    sums_TD = dispatcher.combine_sums(experts(sent.rows_RD, sent.rows_per_expert_L), sent, decided).wait()
    summed = group.traffic
    group.reset_traffic()
    sent = dispatcher.dispatch(x_TD, decided.branches).wait()
    rows_ND = dispatcher.combine(experts(sent.rows_RD, sent.rows_per_expert_L), sent).wait()
    reference_TD = naive(x_TD, decided)
    assert sent.rows_RD.shape[0] == sum(owners[e] == env.rank for tokens in routings for token in tokens for e in token)
    return {
        "error": (sums_TD - reference_TD).abs().max().item() if len(mine) else 0.0,
        "same": torch.equal(sums_TD, dispatcher.weighted_sum(rows_ND, sent, decided)),
        "branches": [expert_rows(x_TD, decided), rows_ND.index_select(0, sent.slot_of_branch_N)],
        "exact": int(summed.bytes_exact),
        "bytes": [summed.bytes_sent, group.traffic.bytes_sent],
        "collectives": [(traffic.collectives, traffic.collectives_skipped) for traffic in (summed, group.traffic)],
    }


def expert_rows(x_TD: Tensor, routing: Routing) -> Tensor:
    """[N, D]: every branch on its own, unweighted."""
    alone = Routing.top_k(routing.expert_N[:, None], torch.ones(len(routing.expert_N), 1))
    return naive(x_TD[routing.token_N], alone)


def bytes_there_and_back(owners: Sequence[int], routings: list[list[list[int]]], rank: int) -> tuple[int, int, int]:
    """What ``rank`` sends with sums and branch by branch, and what its tokens make all ranks send with sums."""
    row, summed, single, for_mine = HIDDEN * 4, 0, 0, 0
    for home, tokens in enumerate(routings):
        for token in tokens:
            for owner in {owners[e] for e in token} - {home}:
                branches = sum(owners[e] == owner for e in token)
                if home == rank:  # there: a header for each branch, the hidden row once
                    summed += branches * SUM_HEADER_BYTES + row
                    single += branches * BRANCH_HEADER_BYTES + row
                    for_mine += branches * SUM_HEADER_BYTES + 2 * row
                if owner == rank:  # back: one sum, or every branch
                    summed += row
                    single += branches * row
    return summed, single, for_mine


def check_exchange(pool, owners: tuple[int, ...], routings: list[list[list[int]]]) -> None:
    nothing = not any(routings)
    for rank, outcome in enumerate(pool.run(exchange_once, owners, routings)):
        assert outcome["error"] < 1e-5 and outcome["same"]
        torch.testing.assert_close(*outcome["branches"], atol=1e-5, rtol=1e-5)
        assert (*outcome["bytes"], outcome["exact"]) == bytes_there_and_back(owners, routings, rank)
        assert outcome["collectives"] == [(0, 2) if nothing else (2, 0)] * 2


@given(st.lists(tokens_routing(7, 4), min_size=2, max_size=2), st.lists(st.integers(0, 1), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_experts_of_a_token_share_a_rank(two_ranks, routings: list[list[list[int]]], owners: list[int]) -> None:
    check_exchange(two_ranks, tuple(owners), routings)


@given(st.lists(tokens_routing(), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_to_all_matches_the_loop(four_ranks, routings: list[list[list[int]]], owners: list[int]) -> None:
    """Any routing, any placement: ranks without tokens, ranks without experts."""
    check_exchange(four_ranks, tuple(owners), routings)


@pytest.mark.parametrize(
    ("owners", "routings"),
    [
        ((0, 0, 1, 1, 2, 3), [[], [], [], []]),
        ((0, 0, 1, 1, 2, 3), [[[0, 1]] * 9, [], [[0, 1]] * 3, []]),
        ((3, 3, 3, 3, 3, 3), [[[0, 5]], [[1, 2]], [], [[4, 3]]]),
        ((0, 0, 0, 2, 2, 2), [[], [[0, 3]] * 20, [], [[5, 1]]]),
    ],
    ids=["nobody", "one owner takes all", "one rank holds all", "ranks without experts"],
)
def test_all_to_all_extremes(four_ranks, owners: tuple[int, ...], routings: list[list[list[int]]]) -> None:
    check_exchange(four_ranks, owners, routings)


@given(st.integers(1, 64), st.integers(1, 16))
def test_contiguous_placement_is_even(num_experts: int, num_ranks: int) -> None:
    placement = ExpertPlacement.contiguous(num_experts, num_ranks)
    held = [placement.experts_of(rank) for rank in range(num_ranks)]
    assert [expert for experts in held for expert in experts] == list(range(num_experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_placement_refuses_unknown_ranks() -> None:
    with pytest.raises(UserError, match=r"names ranks \[4\]"):
        ExpertPlacement((0, 4), 2)

"""Rows in int8 between ranks: nearly the exact outputs, bytes are what travels, own rows stay exact.

Shape suffixes: T tokens, N branches, D hidden size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_dist.kernels.int8_rows import SCALE_BYTES
from moeca_dist.parallel.all_to_all import BRANCH_HEADER_BYTES, SUM_HEADER_BYTES, AllToAllDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.types import Branches, Routing
from tests.helpers.host_waits import waits_of
from tests.parallel.test_dispatch import EXPERTS, HIDDEN, make_experts

CODED_BYTES = SCALE_BYTES + HIDDEN
STEPS = 36


def random_routing(draw: torch.Generator, num_tokens: int, skew: float) -> Routing:
    """``skew``: how much the first experts are preferred."""
    scores_TE = torch.rand(num_tokens, EXPERTS, generator=draw) + skew * torch.linspace(1, 0, EXPERTS)
    return Routing.top_k(scores_TE.topk(3, dim=1).indices, torch.rand(num_tokens, 3, generator=draw))


def dispatchers(owners: tuple[int, ...], replicated: tuple[int, ...] = ()) -> tuple[Any, Any, Any]:
    """On every rank: one with exact rows, one with int8 rows, and the placement."""
    env = LauncherEnv.read()
    group = Mesh.create(env, device_type="cpu", timeout_s=60).expert_group
    assert group is not None
    placement = ExpertPlacement(owners, env.world_size, replicated)
    return AllToAllDispatcher(group, placement), AllToAllDispatcher(group, placement, "int8"), placement


def many_steps(
    owners: tuple[int, ...],
    tokens: Sequence[int],
    skew: float,
    dtype: torch.dtype,
    replicated: tuple[int, ...] = (),
) -> Any:
    """On every rank: random tokens and routings, summed, or some branches one by one."""
    exact, int8, placement = dispatchers(owners, replicated)
    group = exact.collectives
    rank, num_ranks = group.rank, group.size
    experts = make_experts(placement.experts_of(rank)).to(dtype)
    draw = torch.Generator().manual_seed(rank)
    errors, sent_bytes, away = [], {"sums": 0, "branches": 0}, {"sums": [0, 0], "branches": [0, 0]}
    for step in range(STEPS):
        x_TD = torch.randn(tokens[rank], HIDDEN, generator=draw).to(dtype)
        routing = random_routing(draw, len(x_TD), skew)
        owner_N = torch.tensor(placement.owners_for(rank))[routing.expert_N]
        kind, chosen_N, use = "sums", torch.ones_like(owner_N, dtype=torch.bool), summed
        if step % 3 == 2:
            kind, chosen_N, use = "branches", torch.rand(owner_N.shape, generator=draw) < 0.5, one_by_one
        expected = use(exact, x_TD, routing, chosen_N, experts)
        group.reset_traffic()
        found = use(int8, x_TD, routing, chosen_N, experts)
        sent_bytes[kind] += group.traffic.bytes_sent
        branches, pairs = travelling(routing, owner_N, chosen_N, rank, num_ranks)
        away[kind] = [away[kind][0] + branches, away[kind][1] + pairs]
        errors.append((found - expected).float().abs().max().item() if found.numel() else 0.0)
        if kind == "sums":
            here_T = ~routing.tokens_with(owner_N != rank)
            assert torch.equal(found[here_T], expected[here_T])
    return errors, sent_bytes, away


def summed(dispatcher: AllToAllDispatcher, x_TD: Tensor, routing: Routing, _: Tensor, experts: Any) -> Tensor:
    sent = dispatcher.dispatch(x_TD, routing.branches, routing.gate_N).wait()
    return dispatcher.combine_sums(experts(sent.rows_RD, sent.rows_per_expert_L), sent, routing).wait()


def one_by_one(dispatcher: AllToAllDispatcher, x_TD: Tensor, routing: Routing, of_N: Tensor, experts: Any) -> Tensor:
    sent = dispatcher.dispatch(x_TD, Branches(routing.token_N[of_N], routing.expert_N[of_N])).wait()
    rows_ND = dispatcher.combine(experts(sent.rows_RD, sent.rows_per_expert_L), sent).wait()
    return rows_ND.index_select(0, sent.slot_of_branch_N)


def travelling(routing: Routing, owner_N: Tensor, chosen_N: Tensor, rank: int, num_ranks: int) -> tuple[int, int]:
    """Branches and pairs of this rank's tokens that other ranks own."""
    others = [chosen_N & (owner_N == owner) for owner in range(num_ranks) if owner != rank]
    return sum(int(of_N.sum()) for of_N in others), sum(int(routing.tokens_with(of_N).sum()) for of_N in others)


CASES = [
    ((0, 0, 0, 1, 1, 1), (9, 4), 0.0),
    ((1, 0, 1, 0, 0, 1), (7, 0), 0.0),
    ((0, 0, 0, 0, 0, 1), (3, 12), 2.0),
    ((0, 0, 1, 1, 2, 3), (5, 5, 5, 5), 0.0),
    ((3, 3, 0, 1, 1, 3), (0, 11, 1, 6), 3.0),
    ((2, 2, 2, 2, 2, 2), (4, 0, 2, 3), 0.0),
]
IDS = ["even", "a rank without tokens", "skewed", "four", "skewed and empty", "one rank holds all"]


@pytest.mark.parametrize(("owners", "tokens", "skew"), CASES, ids=IDS)
def test_outputs_and_bytes(
    request: pytest.FixtureRequest, owners: tuple[int, ...], tokens: tuple[int, ...], skew: float
) -> None:
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[len(tokens)])
    outcomes = pool.run(many_steps, owners, tokens, skew, torch.float32)
    # Outputs are about 1, and codes of 8 values a hundredth apart.
    assert 0 < max(max(errors) for errors, _, _ in outcomes) < 0.05
    # What all ranks sent: headers and hidden rows there, a sum for each pair or every branch back.
    sent = {kind: sum(outcome[1][kind] for outcome in outcomes) for kind in ("sums", "branches")}
    branches, pairs = (sum(outcome[2]["sums"][index] for outcome in outcomes) for index in (0, 1))
    assert sent["sums"] == branches * SUM_HEADER_BYTES + pairs * 2 * CODED_BYTES
    branches, pairs = (sum(outcome[2]["branches"][index] for outcome in outcomes) for index in (0, 1))
    assert sent["branches"] == branches * (BRANCH_HEADER_BYTES + CODED_BYTES) + pairs * CODED_BYTES
    assert branches and pairs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(two_ranks: Any, dtype: torch.dtype) -> None:
    outcomes = two_ranks.run(many_steps, (0, 0, 1, 1, 1, 0), (6, 3), 0.0, dtype)
    assert all(max(errors) < 0.3 for errors, _, _ in outcomes)


def test_replicated_experts_send_nothing(two_ranks: Any) -> None:
    outcomes = two_ranks.run(many_steps, (0, 0, 0, 1, 1, 1), (6, 3), 1.0, torch.float32, (1, 4))
    assert all(max(errors) < 0.05 for errors, _, _ in outcomes)


def broken_rows(broken: float, leg: str) -> list[tuple[Tensor, Tensor]]:
    """On every rank, summed and one by one: outputs with int8 and with exact rows.

    On the way there token 1 of each rank is broken; on the way back the first row that rank 1 computes.
    """
    exact, int8, placement = dispatchers((0, 0, 0, 1, 1, 1))
    experts = make_experts(placement.experts_of(exact.collectives.rank))
    if leg == "back" and exact.collectives.rank == 1:
        experts.register_forward_hook(lambda _, __, out_RD: out_RD.index_fill(0, torch.tensor([0]), broken))
    x_TD = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(exact.collectives.rank))
    if leg == "there":
        x_TD[1, 3] = broken
    routing = Routing.top_k(torch.tensor([[0, 4], [1, 5], [2, 4], [0, 3]]), torch.full((4, 2), 0.5))
    every_N = torch.ones_like(routing.expert_N, dtype=torch.bool)
    return [
        (use(int8, x_TD, routing, every_N, experts), use(exact, x_TD, routing, every_N, experts))
        for use in (summed, one_by_one)
    ]


@pytest.mark.parametrize("leg", ["there", "back"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_arrive_as_such(two_ranks: Any, broken: float, leg: str) -> None:
    """And the others as if nothing was: what is not finite is where exact rows have it."""
    found = 0
    for outputs in two_ranks.run(broken_rows, broken, leg):
        for int8, exact in outputs:
            whole_N = exact.isfinite().all(1)
            found += int((~whole_N).sum())
            assert not int8[~whole_N].isfinite().any()
            assert (int8[whole_N] - exact[whole_N]).abs().max() < 0.05
    assert found


def waits_of_coding() -> list[list[str]]:
    """On every rank: what coding the rows of both legs would have the host wait for, and what the test would find."""
    exact, int8, placement = dispatchers((0, 0, 0, 1, 1, 1))
    draw = torch.Generator().manual_seed(exact.collectives.rank)
    x_TD, routing = torch.randn(4, HIDDEN, generator=draw), random_routing(draw, 4, 0.0)
    experts = make_experts(placement.experts_of(exact.collectives.rank))
    return [waits_of(partial(summed, each, x_TD, routing, routing.gate_N, experts)) for each in (int8, exact)]


def test_the_host_waits_for_nothing_more(two_ranks: Any) -> None:
    for int8, exact in two_ranks.run(waits_of_coding):
        assert sorted(int8) == sorted(exact) and exact

"""Coded rows between ranks: both ends keep the same references, bytes are what travels, own rows stay exact.

Shape suffixes: T tokens, K routed experts per token, D hidden size, N rows.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_dist.kernels.row_codes import FORMATS, SCALE_BYTES
from moeca_dist.parallel.all_to_all import BRANCH_HEADER_BYTES, SUM_HEADER_BYTES, AllToAllDispatcher
from moeca_dist.parallel.coded_wire import KEY_BYTES
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.references import BlockReferences, Places, RowCoding
from moeca_dist.types import Branches, Routing
from tests.host_waits import waits_of
from tests.test_dispatch import EXPERTS, HIDDEN, make_experts

LEGS = ("hidden", "sums")
CODED_BYTES = SCALE_BYTES + HIDDEN
Kept = dict[str, Tensor | None]
"""References of one block on one rank, by leg and side."""


def kept(references: BlockReferences) -> Kept:
    sides = ("home", "owner")
    return {f"{leg} at {side}": getattr(references, f"{leg}_at_{side}").rows_ND for leg in LEGS for side in sides}


def check_lockstep(tokens: Sequence[int], of_ranks: Sequence[Kept]) -> set[str]:
    """Every reference is at home what it is at the owner, bit for bit; the legs that have any."""
    found = set()
    for leg in LEGS:
        for home, owner in ((a, b) for a in range(len(tokens)) for b in range(len(tokens)) if a != b):
            at_home, at_owner = of_ranks[home][f"{leg} at home"], of_ranks[owner][f"{leg} at owner"]
            assert (at_home is None) == (at_owner is None)
            if at_home is None or at_owner is None:
                continue
            start = (owner - (owner > home)) * tokens[home]
            there = sum(tokens[rank] for rank in range(home) if rank != owner)
            mine = at_home[start : start + tokens[home]]
            assert torch.equal(mine, at_owner[there : there + tokens[home]])
            found |= {leg} if mine.any() else set()
    return found


def random_routing(draw: torch.Generator, num_tokens: int, skew: float) -> Routing:
    """``skew``: how much the first experts are preferred."""
    scores_TE = torch.rand(num_tokens, EXPERTS, generator=draw) + skew * torch.linspace(1, 0, EXPERTS)
    return Routing(scores_TE.topk(3, dim=1).indices, torch.rand(num_tokens, 3, generator=draw))


def many_steps(
    form: str,
    owners: tuple[int, ...],
    tokens: Sequence[int],
    skew: float,
    dtype: torch.dtype,
    replicated: tuple[int, ...] = (),
) -> Any:
    """On every rank: tokens that drift and are routed anew in each step; summed, or some branches one by one."""
    env = LauncherEnv.read()
    group = Mesh.create(env, device_type="cpu", timeout_s=60).expert_group
    assert group is not None
    placement = ExpertPlacement(owners, env.world_size, replicated)
    coding = RowCoding(Places.of(FORMATS[form], env.rank, tokens, 1, torch.device("cpu")))
    plain = AllToAllDispatcher(group, placement)
    coded = plain.coded(coding.block(0))
    experts = make_experts(placement.experts_of(env.rank)).to(dtype)
    draw = torch.Generator().manual_seed(env.rank)
    walk_TD = torch.randn(tokens[env.rank], HIDDEN, generator=draw)
    errors, sent_bytes, away = [], {"sums": 0, "branches": 0}, {"sums": [0, 0], "branches": [0, 0]}
    for step in range(36):
        walk_TD = walk_TD + 0.1 * torch.randn(walk_TD.shape, generator=draw)
        x_TD, routing = walk_TD.to(dtype), random_routing(draw, len(walk_TD), skew)
        owner_TK = torch.tensor(placement.owners_for(env.rank))[routing.expert_ids_TK]
        kind, chosen_TK, use = "sums", torch.ones_like(owner_TK, dtype=torch.bool), summed
        if step % 3 == 2:
            kind, chosen_TK, use = "branches", torch.rand(owner_TK.shape, generator=draw) < 0.5, one_by_one
        expected = use(plain, x_TD, routing, chosen_TK, experts)
        group.reset_traffic()
        found = use(coded, x_TD, routing, chosen_TK, experts)
        sent_bytes[kind] += group.traffic.bytes_sent
        branches, pairs = travelling(owner_TK, chosen_TK, env.rank, env.world_size)
        away[kind] = [away[kind][0] + branches, away[kind][1] + pairs]
        errors.append((found - expected).float().abs().max().item() if found.numel() else 0.0)
        if kind == "sums":
            here_T = (owner_TK == env.rank).all(1)
            assert torch.equal(found[here_T], expected[here_T])
    return kept(coding.blocks[0]), errors, sent_bytes, away


def summed(dispatcher: AllToAllDispatcher, x_TD: Tensor, routing: Routing, _: Tensor, experts: Any) -> Tensor:
    sent = dispatcher.dispatch(x_TD, routing.all_branches(), routing.gates_TK.flatten()).wait()
    return dispatcher.combine_sums(experts(sent.rows_RD, sent.rows_per_expert_L), sent, routing).wait()


def one_by_one(dispatcher: AllToAllDispatcher, x_TD: Tensor, routing: Routing, of_TK: Tensor, experts: Any) -> Tensor:
    every, chosen_N = routing.all_branches(), of_TK.flatten()
    sent = dispatcher.dispatch(x_TD, Branches(every.token_N[chosen_N], every.expert_ids_N[chosen_N])).wait()
    rows_ND = dispatcher.combine(experts(sent.rows_RD, sent.rows_per_expert_L), sent).wait()
    return rows_ND.index_select(0, sent.slot_of_branch_N)


def travelling(owner_TK: Tensor, chosen_TK: Tensor, rank: int, num_ranks: int) -> tuple[int, int]:
    """Branches and pairs of this rank's tokens that other ranks own."""
    others = [(chosen_TK & (owner_TK == owner)) for owner in range(num_ranks) if owner != rank]
    return sum(int(of_TK.sum()) for of_TK in others), sum(int(of_TK.any(1).sum()) for of_TK in others)


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
@pytest.mark.parametrize("form", FORMATS)
def test_both_ends_keep_the_same(
    request: pytest.FixtureRequest, form: str, owners: tuple[int, ...], tokens: tuple[int, ...], skew: float
) -> None:
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[len(tokens)])
    outcomes = pool.run(many_steps, form, owners, tokens, skew, torch.float32)
    assert check_lockstep(tokens, [outcome[0] for outcome in outcomes]) == set(LEGS)
    for _, errors, _, _ in outcomes:
        # Outputs are about 1; codes of 8 values, which first travel by themselves.
        assert max(errors) < (0.05 if form == "int8" else 0.25)
    # What all ranks sent: headers and keys there, a sum for each pair or every branch back.
    sent = {kind: sum(outcome[2][kind] for outcome in outcomes) for kind in ("sums", "branches")}
    branches, pairs = (sum(outcome[3]["sums"][index] for outcome in outcomes) for index in (0, 1))
    assert sent["sums"] == branches * SUM_HEADER_BYTES + pairs * (KEY_BYTES + 2 * CODED_BYTES)
    branches, pairs = (sum(outcome[3]["branches"][index] for outcome in outcomes) for index in (0, 1))
    assert sent["branches"] == branches * (BRANCH_HEADER_BYTES + CODED_BYTES) + pairs * (KEY_BYTES + CODED_BYTES)
    assert branches and pairs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_half_precision_keeps_the_same(two_ranks: Any, form: str, dtype: torch.dtype) -> None:
    outcomes = two_ranks.run(many_steps, form, (0, 0, 1, 1, 1, 0), (6, 3), 0.0, dtype)
    assert check_lockstep((6, 3), [outcome[0] for outcome in outcomes]) == set(LEGS)
    references = [of for outcome in outcomes for of in outcome[0].values() if of is not None]
    assert {of.dtype for of in references} == {dtype} and all(of.isfinite().all() for of in references)
    assert all(max(errors) < 0.3 for _, errors, _, _ in outcomes)


def test_replicated_experts_send_nothing_and_the_others_stay_in_step(two_ranks: Any) -> None:
    outcomes = two_ranks.run(many_steps, "int8", (0, 0, 0, 1, 1, 1), (6, 3), 1.0, torch.float32, (1, 4))
    assert check_lockstep((6, 3), [outcome[0] for outcome in outcomes]) == set(LEGS)
    assert all(max(errors) < 0.05 for _, errors, _, _ in outcomes)


def waits_of_coding() -> list[list[str]]:
    """On every rank: what coding the rows of both legs would have the host wait for, and what the test would find."""
    env = LauncherEnv.read()
    group = Mesh.create(env, device_type="cpu", timeout_s=60).expert_group
    assert group is not None
    coding = RowCoding(Places.of(FORMATS["int8"], env.rank, (4, 4), 1, torch.device("cpu"))).block(0)
    draw = torch.Generator().manual_seed(env.rank)
    walk_TD, routing = torch.randn(4, HIDDEN, generator=draw), random_routing(draw, 4, 0.0)
    plain = AllToAllDispatcher(group, ExpertPlacement((0, 0, 0, 1, 1, 1), 2))
    experts = make_experts(range(3))
    expected = waits_of(lambda: summed(plain, walk_TD, routing, routing.gates_TK, experts))
    return [waits_of(lambda: summed(plain.coded(coding), walk_TD, routing, routing.gates_TK, experts)), expected]


def test_the_host_waits_for_nothing_more(two_ranks: Any) -> None:
    for coded, plain in two_ranks.run(waits_of_coding):
        assert sorted(coded) == sorted(plain) and plain

"""Branch values at the owners: against a loop over tokens, and the bytes against a recount.

Shape suffixes: T tokens, K routed experts per token, N branches, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moeca_dist.cache.owner_cache import OwnerCache
from moeca_dist.cache.policy import HALVES, BranchPolicy, Half, LayerView
from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.moe.owner_layer import OwnerMoELayer
from moeca_dist.moe.router import Router
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.owner_exchange import HEADER_BYTES
from moeca_dist.parallel.row_packing import _packed, _unpacked
from moeca_dist.types import Request, Routing, StepContext
from tests.parallel.test_dispatch import EXPERTS, HIDDEN, make_experts, make_weights

K = 2
ROW_BYTES = HIDDEN * 4


@dataclass(frozen=True)
class Step:
    """One denoising step of one rank: ids and wanted refreshes [token][slot] for both halves, one after the other."""

    full: tuple[bool, bool]
    ids: tuple[tuple[int, ...], ...]
    wanted: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Scripted(BranchPolicy):
    """Refreshes what the script says, and whatever is unmatched."""

    steps: tuple[Step, ...]

    name: ClassVar[str] = "scripted"

    def is_full(self, step: StepContext, half: Half) -> bool:
        return self.steps[step.index].full[HALVES.index(half)]

    @property
    def halves_agree(self) -> bool:
        return all(conditional == unconditional for conditional, unconditional in (step.full for step in self.steps))

    def refresh(self, step: StepContext, view: LayerView) -> Tensor:
        wanted_TK = torch.tensor(self.steps[step.index].wanted, dtype=torch.bool).view(-1, K)
        half_T = torch.arange(2).repeat_interleave(len(wanted_TK) // 2)
        return wanted_TK[torch.isin(half_T, view.half_B)].flatten()


class FixedRouter(Router):
    """Routes as told."""

    def __init__(self) -> None:
        super().__init__()
        self.routing: Routing

    def forward(self, x_TD: Tensor) -> Routing:
        return self.routing


class NoShared(nn.Module):
    """A shared expert that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def inputs(rank: int, step: int, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, ids and gates of all tokens of a rank."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, K)
    x_TD = torch.randn(len(ids), HIDDEN, generator=draw)
    return x_TD, ids_TK, torch.rand(len(ids), K, generator=draw)


class Loop:
    """One rank's tokens, one by one, with all weights at hand; also counts what must travel."""

    def __init__(self, rank: int, owners: Sequence[int], order: int) -> None:
        self.rank, self.owners, self.order = rank, owners, order
        self.branches: dict[int, dict[int, list[tuple[int, Tensor]]]] = {}
        self.sums: dict[int, tuple[int, Tensor, Tensor]] = {}  # token -> (step, sum, slope)
        self.bytes = 0
        self.touched: set[tuple[int, int]] = set()  # step and token

    def step(self, index: int, script: Step) -> Tensor:
        x_TD, _, gates_TK = inputs(self.rank, index, script.ids)
        out_TD = torch.zeros_like(x_TD)
        for token, ids in enumerate(script.ids):
            full = script.full[0 if token < len(script.ids) // 2 else 1]
            held = self.branches.setdefault(token, {})
            refresh = {e for slot, e in enumerate(ids) if full or script.wanted[token][slot] or e not in held}
            out_TD[token] = self._token(index, token, ids, refresh, x_TD[token], gates_TK[token].tolist())
        return out_TD

    def _token(self, index: int, token: int, ids: Sequence[int], refresh: set[int], x: Tensor, gates: Any) -> Tensor:
        if not refresh:
            step, total, slope = self.sums[token]
            return total + slope * (index - step)
        self.touched.add((index, token))
        held = self.branches[token]
        changed = any(e not in held for e in ids)
        for expert in refresh:
            held.setdefault(expert, []).append((index, expert_output(expert, x)))
        self.branches[token] = held = {e: held[e] for e in ids}
        total = sum((g * self._value(held[e], index) for g, e in zip(gates, ids, strict=True)), torch.zeros(HIDDEN))
        slope = torch.zeros(HIDDEN)
        if self.order and token in self.sums:
            before_step, before, old_slope = self.sums[token]
            slope = old_slope if changed else (total - before) / (index - before_step)
        self.sums[token] = index, total, slope
        self._count(ids, refresh)
        return total

    def _value(self, seen: list[tuple[int, Tensor]], index: int) -> Tensor:
        step, value = seen[-1]
        if not self.order or len(seen) < 2:
            return value
        before_step, before = seen[-2]
        return value + (value - before) / (step - before_step) * (index - step)

    def _count(self, ids: Sequence[int], refresh: set[int]) -> None:
        for owner in {self.owners[e] for e in ids} - {self.rank}:
            theirs = [e for e in ids if self.owners[e] == owner]
            self.bytes += HEADER_BYTES * len(theirs) + ROW_BYTES  # the row that comes back
            self.bytes += ROW_BYTES if refresh & set(theirs) else 0


def expert_output(expert: int, x: Tensor) -> Tensor:
    w = {name: weight[expert] for name, weight in make_weights().items()}
    return w["w2"] @ (torch.nn.functional.silu(w["w1"] @ x) * (w["w3"] @ x))


def run_script(owners: tuple[int, ...], scripts: list[tuple[Step, ...]], order: int) -> dict[str, Any]:
    """On every rank: its own script through the layer, part by part, beside the loop over its tokens."""
    env = LauncherEnv.read()
    mesh = Mesh.create(env, device_type="cpu", timeout_s=60)
    group = mesh.expert_group
    assert group is not None
    group.reset_traffic()
    placement = ExpertPlacement(owners, env.world_size)
    router = FixedRouter()
    layer = OwnerMoELayer(router, make_experts(placement.experts_of(env.rank)), NoShared(), EXPERTS)
    layer.local_expert_ids = placement.experts_of(env.rank)
    layer.dispatcher = AllToAllDispatcher(group, placement)
    script = scripts[env.rank]
    policy = Scripted(steps=script, order=order)
    images = [Request(index, 0) for index in range(len(script[0].ids) // 2)]  # an image is one token here
    session = CacheSession(
        policy,
        images,
        guided=True,
        num_blocks=1,
        num_experts=len(owners),
        statistics=CacheStatistics(),
        owner_ranks=env.world_size,
    )
    loop, error, moved = Loop(env.rank, owners, order), 0.0, []
    for index, step in enumerate(script):
        x_TD, ids_TK, gates_TK = inputs(env.rank, index, step.ids)
        expected_TD = loop.step(index, step)
        for part in session.at(StepContext(index, len(script), 0.0)):
            mine, cache = part.images, part.block(0)  # an image is one token
            router.routing = Routing.top_k(ids_TK[mine], gates_TK[mine])
            before = group.traffic.collectives, group.traffic.collectives_skipped
            plan = layer.plan(x_TD[mine, None], cache)
            out_TD = layer.cached(x_TD[mine, None], plan, cache).squeeze(1)
            here = (group.traffic.collectives - before[0], group.traffic.collectives_skipped - before[1])
            touched = any((index, token) in loop.touched for token in range(mine.start, mine.stop))
            moved.append((*here, touched))
            error = max(error, *(out_TD - expected_TD[mine]).abs().flatten().tolist(), 0.0)
    kept = [part.blocks[0].branches for part in session.parts]
    assert all(isinstance(each, OwnerCache) for each in kept)
    return {
        "parts": len(kept),
        "error": error,
        "bytes": group.traffic.bytes_sent,
        "expected": loop.bytes,
        "moved": moved,
        "capacities": summed([each.slots.capacities for each in kept]),
        "used": summed([each.slots.in_use for each in kept]),
    }


def summed(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def check(pool: Any, owners: Sequence[int], scripts: list[tuple[Step, ...]], order: int) -> None:
    results = pool.run(run_script, tuple(owners), scripts, order)
    agree = all(conditional == unconditional for conditional, unconditional in (step.full for step in scripts[0]))
    assert {result["parts"] for result in results} == {1 if agree else 2}
    assert sum(result["bytes"] for result in results) == sum(result["expected"] for result in results)
    for evaluation, per_rank in enumerate(zip(*(result["moved"] for result in results), strict=True)):
        anything = any(touched for *_, touched in per_rank)
        assert {moved[:2] for moved in per_rank} == {(2, 0) if anything else (0, 2)}, evaluation
    for script, result in zip(scripts, results, strict=True):
        assert result["error"] < 1e-4
        # Every branch has a row of its own: none is shared by tokens or by the halves, none is forgotten.
        assert sum(result["used"]) == len(script[0].ids) * K


def scripts_of(num_ranks: int) -> st.SearchStrategy[list[tuple[Step, ...]]]:
    """Per rank the steps of up to three images; the halves' full steps are the same on all ranks."""
    apart, together = st.tuples(st.booleans(), st.booleans()), st.sampled_from([(True, True), (False, False)])
    fulls = st.one_of(*(st.lists(each, min_size=1, max_size=5) for each in (apart, together)))
    images = st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks)
    return st.tuples(fulls, images, st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 10**6)).map(
        lambda drawn: [drawn_script(rank, [(True, True), *drawn[0]], *drawn[1:]) for rank in range(num_ranks)]
    )


def drawn_script(
    rank: int, fulls: list[tuple[bool, bool]], images: list[int], change: float, seed: int
) -> tuple[Step, ...]:
    """Routing that drifts: in each step some tokens get other experts, and some branches are refreshed."""
    draw = torch.Generator().manual_seed(seed + rank)
    tokens = 2 * images[rank]
    ids = [torch.randperm(EXPERTS, generator=draw)[:K].tolist() for _ in range(tokens)]
    steps = []
    for full in fulls:
        for token in range(tokens):
            if torch.rand(1, generator=draw) < change:
                ids[token] = torch.randperm(EXPERTS, generator=draw)[:K].tolist()
        wanted = (torch.rand(tokens, K, generator=draw) < change).tolist()
        steps.append(Step(full, tuple(map(tuple, ids)), tuple(map(tuple, wanted))))
    return tuple(steps)


ranks_settings = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(scripts_of(2), st.lists(st.integers(0, 1), min_size=6, max_size=6), st.integers(0, 1))
@ranks_settings(max_examples=40)
def test_two_ranks_match_the_loop(two_ranks, scripts, owners, order) -> None:
    check(two_ranks, owners, scripts, order)


@given(scripts_of(4), st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 1))
@ranks_settings(max_examples=30)
def test_four_ranks_match_the_loop(four_ranks, scripts, owners, order) -> None:
    """Any owners: ranks without experts, ranks without tokens, one owner of everything."""
    check(four_ranks, owners, scripts, order)


def quiet(ids: Sequence[Sequence[int]], full: bool = False, wanted: bool = False) -> Step:
    return Step((full, full), tuple(map(tuple, ids)), tuple((wanted,) * K for _ in ids))


@pytest.mark.parametrize(
    ("owners", "routings"),
    [
        ((0, 0, 1, 1, 2, 3), [[], [], [], []]),
        ((0, 0, 1, 1, 2, 3), [[[0, 1]] * 8, [], [[0, 1]] * 4, []]),
        ((3, 3, 3, 3, 3, 3), [[[0, 5]] * 2, [[1, 2]] * 2, [], [[4, 3]] * 2]),
        ((0, 0, 0, 2, 2, 2), [[], [[0, 3]] * 20, [], [[5, 1]] * 2]),
    ],
    ids=["nobody", "one owner takes all", "one rank holds all", "ranks without experts"],
)
@pytest.mark.parametrize("apart", [False, True], ids=["one part", "two parts"])
def test_extremes(four_ranks, owners, routings, apart: bool) -> None:
    """Full, nothing, everything one by one, nothing, full: silent exactly where nobody refreshes."""
    pattern = [(True, False), (False, False), (False, True), (False, False), (True, False)]
    scripts = [tuple(quiet(ids, *flags) for flags in pattern) for ids in routings]
    if apart:  # at the end the conditional half alone
        scripts = [(*steps[:-1], Step((True, False), steps[-1].ids, steps[-1].wanted)) for steps in scripts]
    check(four_ranks, owners, scripts, 1)


def test_one_rank_alone_makes_all_take_part(four_ranks) -> None:
    """A single refreshed branch on one rank: everyone joins the two collectives, and only its bytes travel."""
    still = [(0, 5), (1, 4)]
    scripts = [(quiet(still, full=True), quiet(still)) for _ in range(4)]
    lone = Step((False, False), tuple(still), ((True, False), (False, False)))
    scripts[2] = (scripts[2][0], lone)
    owners = (0, 0, 1, 1, 2, 3)
    check(four_ranks, owners, scripts, 0)
    results = four_ranks.run(run_script, owners, scripts, 0)
    start = four_ranks.run(run_script, owners, [script[:1] for script in scripts], 0)
    # Token (0, 5): headers to owners 0 and 3, its hidden row to owner 0 alone, a row back from each.
    extra = sum(r["bytes"] for r in results) - sum(r["bytes"] for r in start)
    assert extra == 2 * HEADER_BYTES + ROW_BYTES + 2 * ROW_BYTES


def test_rows_of_odd_bytes_are_packed_and_unpacked() -> None:
    """Five bf16 numbers are ten bytes: headers behind them lie off the boundaries that their words want."""
    header_N3 = torch.arange(12, dtype=torch.int32).view(4, 3)
    rows_MD = torch.arange(10).bfloat16().view(2, 5)
    packed = _packed(header_N3, rows_MD, [1, 0, 3], [1, 0, 1])
    assert packed.shape[0] == 4 * HEADER_BYTES + 2 * 10
    headers, rows = _unpacked(packed, header_N3, rows_MD, [1, 0, 3], [1, 0, 1])
    assert torch.equal(headers, header_N3) and torch.equal(rows, rows_MD)


def test_rows_are_used_again(two_ranks) -> None:
    """Experts that come and go do not make the owners' caches grow without end."""
    there, back = [(0, 1)] * 6, [(4, 5)] * 6
    scripts = [tuple(quiet(there if step % 2 else back, full=step == 0) for step in range(12)) for _ in range(2)]
    for result in two_ranks.run(run_script, (0, 0, 0, 1, 1, 1), scripts, 1):
        assert result["capacities"] == [12, 12] and sorted(result["used"]) == [0, 12]

"""Exchange mode ``planned``: against a loop over tokens, on uneven ranks, and in whole networks.

Shape suffixes: B images of one token each, K routed experts per token, E experts, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist import Engine, UserError
from moeca_dist.cache.policies.scheduled import Defaults
from moeca_dist.cache.policy import Half, LayerView, RefreshPlan, Unit
from moeca_dist.cache.session import HALVES, CacheSession
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
from moeca_dist.checks import check_config
from moeca_dist.config import CacheConfig, Config
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.router import SigmoidRouter
from moeca_dist.parallel.all_to_all import BRANCH_HEADER_BYTES, AllToAllDispatcher
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.types import Request, StepContext
from moeca_dist.work import Work
from tests.golden_files import load_golden
from tests.test_cache_contract import count_products, load, requests
from tests.test_dispatch import EXPERTS, HIDDEN, WIDTH, make_experts
from tests.test_owner_placement import expert_output
from tests.test_placement_images import difference, generate, make_config, ranks  # noqa: F401

K, BLOCKS, ROW_BYTES = 2, 2, HIDDEN * 4
SCALE = 1.5


# ---- layers against a loop -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """What one rank's tokens, conditional then unconditional ones, meet in every step; ``fulls`` on all ranks alike.

    ``drift``: how far inputs move per step; ``wanted``: the share of branches that the policy chooses.
    """

    fulls: tuple[tuple[bool, bool], ...]
    images: int
    drift: float
    wanted: float
    seed: int

    def inputs(self, step: int, block: int) -> Tensor:
        """[B, 1, D]"""
        x_B1D = torch.randn(2 * self.images, 1, HIDDEN, generator=self._draw(block))
        for before in range(step):
            x_B1D += self.drift * torch.randn(x_B1D.shape, generator=self._draw(100 + 10 * before + block))
        return x_B1D

    def chosen(self, step: int, block: int) -> Tensor:
        """bool [B, E]: branches that are refreshed if they are routed to."""
        return torch.rand(2 * self.images, EXPERTS, generator=self._draw(1000 + 10 * step + block)) < self.wanted

    def _draw(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10_000 + what)


@dataclass(frozen=True, kw_only=True)
class Scripted(Defaults):
    script: Script

    name: ClassVar[str] = "scripted"
    unit: ClassVar[Unit] = "branch"

    def is_full(self, step: StepContext, half: Half) -> bool:
        return self.script.fulls[step.index][HALVES.index(half)]

    def plan(self, step: StepContext, view: LayerView) -> RefreshPlan:
        chosen_BE = self.script.chosen(step.index, view.layer).chunk(2)[HALVES.index(view.half)]
        return RefreshPlan(chosen_BE.gather(1, view.routing.expert_ids_TK) | ~view.match.found_TK)


class Token:
    """One token in one block, with what is stored and what was decided for it; also counts what must travel."""

    def __init__(self, rank: int, owners: Sequence[int], order: int) -> None:
        self.rank, self.owners, self.order = rank, owners, order
        self.held: dict[int, list[tuple[int, Tensor]]] = {}
        self.inputs: list[tuple[int, Tensor]] = []
        self.planned: tuple[list[int], set[int]] = ([], set())
        self.unmatched = 0
        self.reasons = dict.fromkeys(Reason, 0)
        self.bytes = 0

    def step(
        self, index: int, x: Tensor, full: bool, full_next: bool, chosen_next: Sequence[bool]
    ) -> tuple[Tensor, set]:
        scores = torch.sigmoid(x[:EXPERTS] * 3)
        routed = scores.argsort(descending=True)[:K].tolist()
        ids, refresh = (routed, set(routed)) if full else self.planned
        unmatched = K if full else self.unmatched
        self.reasons[Reason.FULL if full else Reason.UNMATCHED] += unmatched
        self.reasons[Reason.SCORE] += len(refresh) - unmatched
        self.reasons[Reason.SERVED] += K - len(refresh)
        for expert in refresh:
            self.held.setdefault(expert, []).append((index, expert_output(expert, x)))
        self.held = {expert: self.held[expert] for expert in ids}
        weights = {expert: SCALE * scores[expert] / scores[ids].sum() for expert in ids}
        total = sum((weights[expert] * self._value(self.held[expert], index) for expert in ids), torch.zeros(HIDDEN))
        if not full_next:
            self.planned = routed, {e for e in routed if e not in self.held or chosen_next[e]}
            self.unmatched = sum(e not in self.held for e in routed)
        for owner in {self.owners[e] for e in refresh} - {self.rank}:
            branches = sum(self.owners[e] == owner for e in refresh)
            self.bytes += ROW_BYTES + branches * (BRANCH_HEADER_BYTES + ROW_BYTES)
        if full:  # without a shared expert a layer adds its input, which is served as any module is
            self.inputs.append((index, x))
        return total + self._value(self.inputs, index), refresh

    def _value(self, seen: list[tuple[int, Tensor]], index: int) -> Tensor:
        if not self.order or len(seen) < 2:
            return seen[-1][1]
        (before_step, before), (step, value) = seen[-2:]
        return value + (value - before) / (step - before_step) * (index - step)


def make_layers(owners: Sequence[int], rank: int, dispatcher: AllToAllDispatcher) -> list[MoELayer]:
    layers = []
    for _ in range(BLOCKS):
        router = SigmoidRouter(HIDDEN, EXPERTS, K, 1, 1, SCALE).requires_grad_(False)
        router.weight.copy_(torch.eye(EXPERTS, HIDDEN) * 3)
        layer = MoELayer(HIDDEN, router, EXPERTS, WIDTH, 0)
        layer.experts = make_experts([expert for expert, owner in enumerate(owners) if owner == rank])
        layer.dispatcher = dispatcher
        layers.append(layer)
    return layers


def run_script(owners: tuple[int, ...], scripts: list[Script], order: int) -> dict[str, Any]:
    """On every rank: its own tokens through two layers, step by step, beside the loop over them."""
    env = LauncherEnv.read()
    group = Mesh.create(env, device_type="cpu", timeout_s=60).expert_group
    assert group is not None
    group.reset_traffic()
    script = scripts[env.rank]
    layers = make_layers(owners, env.rank, AllToAllDispatcher(group, ExpertPlacement(owners, env.world_size)))
    session = CacheSession(
        Scripted(script=script, order=order),
        [Request(index, 0) for index in range(script.images)],
        guided=True,
        num_blocks=BLOCKS,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        statistics=CacheStatistics(),
        planned=True,
    )
    tokens = [[Token(env.rank, owners, order) for _ in range(2 * script.images)] for _ in range(BLOCKS)]
    error, moved, num_steps = 0.0, [], len(script.fulls)
    for index in range(num_steps):
        step_cache = session.at(StepContext(index, num_steps, 0.0))
        for block, layer in enumerate(layers):
            before = group.traffic.collectives, group.traffic.collectives_elided, group.traffic.agreements
            x_B1D = script.inputs(index, block)
            found_BD = layer(x_B1D, step_cache.block(block))[:, 0]
            refreshed = 0
            following = min(index + 1, num_steps - 1)
            for position, token in enumerate(tokens[block]):
                half = position >= script.images
                expected, refresh = token.step(
                    index, x_B1D[position, 0], script.fulls[index][half], script.fulls[following][half],
                    script.chosen(following, block)[position].tolist(),
                )  # fmt: skip
                error = max(error, (found_BD[position] - expected).abs().max().item())
                refreshed += len(refresh)
            after = group.traffic.collectives, group.traffic.collectives_elided, group.traffic.agreements
            moved.append((*(now - then for now, then in zip(after, before, strict=True)), refreshed))
    counts = session.statistics
    return {
        "error": error,
        "bytes": group.traffic.bytes_sent,
        "expected": sum(token.bytes for block in tokens for token in block),
        "moved": moved,
        "counted": {reason: counts.total(reason) for reason in Reason},
        "reasons": {reason: sum(token.reasons[reason] for block in tokens for token in block) for reason in Reason},
    }


def check(pool: Any, owners: Sequence[int], scripts: list[Script], order: int) -> None:
    results = pool.run(run_script, tuple(owners), scripts, order)
    assert sum(result["bytes"] for result in results) == sum(result["expected"] for result in results)
    for place, per_rank in enumerate(zip(*(result["moved"] for result in results), strict=True)):
        step, block = divmod(place, BLOCKS)
        anything = any(refreshed for *_, refreshed in per_rank)
        # Steps with full parts agree in every layer, the others once, before the first.
        agreements = int(any(scripts[0].fulls[step]) or block == 0)
        assert {counts[:3] for counts in per_rank} == {((2, 0) if anything else (0, 2)) + (agreements,)}, place
    for script, result in zip(scripts, results, strict=True):
        assert result["error"] < 1e-4
        assert result["counted"] == result["reasons"]
        assert sum(result["counted"][why] for why in REFRESHED) == sum(refreshed for *_, refreshed in result["moved"])
        assert sum(result["counted"].values()) == 2 * script.images * len(script.fulls) * BLOCKS * K


def scripts_of(num_ranks: int) -> st.SearchStrategy[list[Script]]:
    """Up to three images per rank, some with none; routing that stands still, drifts or jumps."""
    fulls = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5)
    images = st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks)
    shares = st.sampled_from([0.0, 0.1, 0.5])
    return st.tuples(fulls, images, shares, shares, st.integers(0, 10**6)).map(
        lambda drawn: [
            Script(((True, True), *drawn[0]), drawn[1][rank], drawn[2], drawn[3], drawn[4] + rank)
            for rank in range(num_ranks)
        ]
    )


@given(scripts_of(2), st.lists(st.integers(0, 1), min_size=6, max_size=6), st.integers(0, 1))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_ranks_match_the_loop(two_ranks, scripts, owners, order) -> None:
    check(two_ranks, owners, scripts, order)


@given(scripts_of(4), st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 1))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_four_ranks_match_the_loop(four_ranks, scripts, owners, order) -> None:
    """Any placement: ranks without experts, ranks without tokens, one owner of everything."""
    check(four_ranks, owners, scripts, order)


@pytest.mark.parametrize("owners", [(0, 0, 1, 1, 2, 3), (3,) * 6, (0, 0, 0, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("images", [(0, 0, 0, 0), (0, 0, 5, 0), (7, 0, 1, 0)], ids=str)
def test_extremes(four_ranks, owners, images) -> None:
    """Nobody, one rank alone, very uneven ranks; halves that are full apart, and steps in which nothing moves."""
    fulls = ((True, True), (False, False), (False, True), (False, False), (True, False), (False, False))
    for drift, wanted in ((0.0, 0.0), (1.0, 0.0), (0.2, 0.3)):
        scripts = [Script(fulls, images[rank], drift if rank == 2 else 0.0, wanted, rank) for rank in range(4)]
        check(four_ranks, owners, scripts, 1)


# ---- whole networks --------------------------------------------------------------------------------------------------

POLICIES = ("moeca_forecast", "moeca", "random", "dice_skip")
FULL_STEPS = [0, 1, 4]
WORLDS = pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def planned(model: dict[str, Any], cache: dict[str, Any], ep_size: int | None = None) -> Config:
    config = make_config(model, cache, ep_size)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"exchange": "planned"})})


@WORLDS
@pytest.mark.parametrize("policy", POLICIES)
def test_images_do_not_depend_on_the_ranks(ranks, model, policy: str, world: tuple[int, int]) -> None:  # noqa: F811
    cache = {"policy": policy, "full_steps": FULL_STEPS}
    expected, alone, _ = generate(planned(model, cache))
    images, report, _ = ranks(world[0]).run(generate, planned(model, cache, world[1]))[0]
    assert difference(images, expected) <= 1e-5
    assert (report.branches, report.flops) == (alone.branches, alone.flops)
    assert report.exchange.mode == alone.exchange.mode == "planned" and report.exchange.placement == "home"
    num_steps, layers = alone.num_steps, len(report.cache.per_layer)
    rounds = -(-5 // (2 * world[0]))  # five images, two per rank and round
    assert report.exchange.agreements == rounds * (num_steps - len(FULL_STEPS) + layers * len(FULL_STEPS))
    assert (alone.exchange.agreements, alone.exchange.bytes_sent) == (0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_an_approximation_that_saves_unmatched_branches(two_ranks, model, policy: str) -> None:
    cache = {"policy": policy, "full_steps": FULL_STEPS}
    exact, by_layer, _ = two_ranks.run(generate, make_config(model, cache))[0]
    images, by_step, _ = two_ranks.run(generate, planned(model, cache))[0]
    assert 1e-5 < difference(images, exact) < 0.2
    # Two images per rank at once, two halves. For each branch two int64 and two bools, for this step and the next.
    branches = 4 * 2 * by_step.branches.routed // (5 * 2 * by_step.num_steps)
    assert by_step.cache.bytes_peak - by_layer.cache.bytes_peak == branches * 18 * 2
    # What is unmatched in the last step, or just before a full one, is never computed.
    assert by_step.branches.unmatched < by_layer.branches.unmatched
    assert by_step.exchange.agreements < by_layer.exchange.agreements
    if policy == "moeca_forecast":  # which computes nothing else
        assert by_step.exchange.bytes_sent < by_layer.exchange.bytes_sent


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_that_never_reuses_is_bit_identical(two_ranks, model, policy: str) -> None:
    config = planned(model, {"policy": policy, "interval": 1})
    expected, _, _ = two_ranks.run(generate, make_config(model, {}))[0]
    assert np.array_equal(two_ranks.run(generate, config)[0][0], expected)
    assert np.array_equal(generate(config)[0], generate(make_config(model, {}))[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_consecutive_requests_share_nothing(model, policy: str) -> None:
    config = planned(model, {"policy": policy, "full_steps": FULL_STEPS})
    assert np.array_equal(generate(config)[0], generate(config, False, 2)[0])


def test_halves_apart(two_ranks, model) -> None:
    """Steps with a full and a served half follow the current routing in one and the planned in the other."""
    halves = {"conditional": [0, 1, 3, 5], "unconditional": [0, 4]}
    config = planned(model, {"policy": "moeca_forecast", "full_steps": halves})
    expected, alone, _ = generate(config)
    images, report, _ = two_ranks.run(generate, config)[0]
    assert difference(images, expected) <= 1e-5 and report.branches == alone.branches


@pytest.mark.parametrize("policy", POLICIES)
def test_counted_flops_are_those_of_the_matrix_products(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("dsmoe_e8", tmp_path)
    counted = count_products(model, monkeypatch)
    config = planned(
        {"checkpoint": str(tmp_path / "dsmoe_e8.safetensors"), "device": "cpu", **load_golden("dsmoe_e8").options},
        {"policy": policy, "full_steps": FULL_STEPS},
    )
    engine = Engine(config, Mesh.single(), model)
    _, report = engine.generate(requests(2))
    assert report.flops.computed == sum(counted)
    assert Work(model.spec, 2 * 2 * report.num_steps, None, CacheStatistics()).flops().full == report.flops.full


@pytest.mark.parametrize("policy", ["none", "fora", "taylorseer", "toca", "teacache"])
def test_without_branches_it_is_refused(model, policy: str) -> None:
    with pytest.raises(UserError, match=rf"parallel.exchange planned has no effect with cache.policy {policy}"):
        check_config(planned(model, {"policy": policy}), [0])


@pytest.mark.parametrize("placement", ["owner", "auto"])
def test_only_home_can_carry_it_out(model, placement: str) -> None:
    config = planned(model, {"policy": "random", "placement": placement})
    with pytest.raises(UserError, match=rf"at home, not where cache.placement {placement} may put them"):
        check_config(config, [0])
    Engine.from_config(planned(model, {"policy": "random", "placement": "home"}))


def test_the_uncached_reference_is_exact(model) -> None:
    engine = Engine.from_config(planned(model, {"policy": "moeca_forecast"})).without_cache()
    assert engine.config.parallel.exchange == "exact" and engine.config.cache == CacheConfig()

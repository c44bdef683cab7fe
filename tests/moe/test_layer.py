"""Routings in which experts choose their tokens, and experts given as modules, through a whole MoE layer.

A token then has from no expert to all of them, and images have equal numbers of branches.

Shape suffixes: B images, T tokens (of one image with B, else of all), D hidden size, E experts, N branches, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from moeca_dist.cache.policy import BranchPolicy, Half, LayerView
from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
from moeca_dist.moe.experts import ExpertModules, Experts, SwiGLU
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.owner_layer import OwnerMoELayer
from moeca_dist.moe.router import Router
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.types import Request, Routing, StepContext
from tests.parallel.test_dispatch import EXPERTS, HIDDEN, WIDTH, make_experts, make_weights

TOKENS, CHOSEN = 5, 2  # of one image; tokens that each expert chooses in it
FULL, NUM_STEPS = (0, 2, 5), 7


class ExpertsChoose(Router):
    """Each expert takes the tokens of each image that score highest with it."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(8)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=draw), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = (x_TD @ self.weight.T).sigmoid()
        score_BTE = scores_TE.view(-1, TOKENS, EXPERTS)
        chosen_BTE = torch.zeros_like(score_BTE, dtype=torch.bool)
        chosen_BTE.scatter_(1, score_BTE.topk(CHOSEN, dim=1).indices, True)
        token_N, expert_N = chosen_BTE.flatten(0, 1).nonzero().unbind(1)
        return Routing.listed(token_N, expert_N, scores_TE[token_N, expert_N], x_TD.shape[0])


@dataclass(frozen=True, kw_only=True)
class Scripted(BranchPolicy):
    """Refreshes some branches by expert and step."""

    name: ClassVar[str] = "scripted"

    def is_full(self, step: StepContext, half: Half) -> bool:
        return step.index in FULL

    def refresh(self, step: StepContext, view: LayerView) -> Tensor:
        return is_wanted(step.index, view.routing.expert_N)


def is_wanted(step: int, expert: Any) -> Any:
    return (expert + step) % 5 == 0


def make_shared() -> SwiGLU:
    shared, draw = SwiGLU(HIDDEN, WIDTH), torch.Generator().manual_seed(6)
    for weight in shared.parameters():
        weight.data = torch.randn(weight.shape, generator=draw) * 0.3
    return shared.requires_grad_(False)


def make_layer(experts: Experts | None = None, router: Router | None = None) -> MoELayer:
    return MoELayer(router or ExpertsChoose(), experts or make_experts(range(EXPERTS)), make_shared(), EXPERTS)


def inputs(step: int, images: range) -> Tensor:
    """[B, T, D]: hidden rows of some images, which drift from step to step, and their routes with them."""
    parts = []
    for image in images:
        draw = torch.Generator().manual_seed(image)
        x_TD = torch.randn(TOKENS, HIDDEN, generator=draw)
        for _ in range(step):
            x_TD = x_TD + 0.3 * torch.randn(TOKENS, HIDDEN, generator=draw)
        parts.append(x_TD)
    return torch.stack(parts) if parts else torch.empty(0, TOKENS, HIDDEN)


def expert_output(expert: int, x_D: Tensor) -> Tensor:
    w = {name: weight[expert] for name, weight in make_weights().items()}
    return w["w2"] @ (torch.nn.functional.silu(w["w1"] @ x_D) * (w["w3"] @ x_D))


Seen = list[tuple[int, Tensor]]
"""Steps and values that were computed, the oldest first."""


def expected_now(seen: Seen, step: int, order: int) -> Tensor:
    (last, value), *before = reversed(seen)
    return value if not order or not before else value + (value - before[0][1]) / (last - before[0][0]) * (step - last)


class Loop:
    """Branch by branch, with all weights at hand; ``order`` None computes everything."""

    def __init__(self, order: int | None) -> None:
        self.order = order
        self.branches: dict[tuple[int, int], Seen] = {}
        self.shared: Seen = []
        self.refreshed = 0

    def step(self, step: int, x_BTD: Tensor) -> Tensor:
        x_TD, shared = x_BTD.flatten(0, 1), make_shared()
        routing = ExpertsChoose()(x_TD)
        is_full = self.order is None or step in FULL
        branches = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
        self.branches = {branch: seen for branch, seen in self.branches.items() if branch in branches}
        if is_full:
            self.shared.append((step, shared(x_TD)))
        out_TD = expected_now(self.shared, step, self.order or 0).clone()
        for (token, expert), gate in zip(branches, routing.gate_N, strict=True):
            seen = self.branches.setdefault((token, expert), [])
            if is_full or not seen or is_wanted(step, expert):
                seen.append((step, expert_output(expert, x_TD[token])))
                self.refreshed += not is_full
            out_TD[token] += gate * expected_now(seen, step, self.order or 0)
        return out_TD.view_as(x_BTD)


class OwnerLoop(Loop):
    """The same with values at the owners, without forecasts: untouched tokens keep their last routed sum."""

    def __init__(self) -> None:
        super().__init__(0)
        self.sums: dict[int, Tensor] = {}
        self.served_after_a_drop = 0

    def step(self, step: int, x_BTD: Tensor) -> Tensor:
        before = {token: {e for t, e in self.branches if t == token} for token in range(len(x_BTD) * TOKENS)}
        out_TD = super().step(step, x_BTD).flatten(0, 1)
        shared_TD = expected_now(self.shared, step, 0)
        for token, experts in before.items():
            now = {e for t, e in self.branches if t == token}
            if step in FULL or now != experts or any(is_wanted(step, expert) for expert in now):
                self.sums[token] = out_TD[token] - shared_TD[token]
                self.served_after_a_drop += now < experts and not any(is_wanted(step, expert) for expert in now)
            out_TD[token] = self.sums[token] + shared_TD[token]
        return out_TD.view_as(x_BTD)


def run_cached(
    layer: MoELayer, order: int, images: range, owner_ranks: int | None = None
) -> tuple[list[Tensor], CacheStatistics]:
    session = CacheSession(
        Scripted(order=order),
        [Request(image, 0) for image in images],
        guided=False,
        num_blocks=1,
        num_experts=EXPERTS,
        statistics=CacheStatistics(),
        owner_ranks=owner_ranks,
    )
    outputs = []
    for index in range(NUM_STEPS):
        (part,) = session.at(StepContext(index, NUM_STEPS, 0.0))
        cache, x_BTD = part.block(0), inputs(index, images)
        outputs.append(layer.cached(x_BTD, layer.plan(x_BTD, cache), cache))
    return outputs, session.statistics


def test_tokens_have_from_no_expert_to_many() -> None:
    counts = set()
    for step in range(NUM_STEPS):
        x_TD = inputs(step, range(12)).flatten(0, 1)
        counts |= set(torch.bincount(ExpertsChoose()(x_TD).token_N, minlength=len(x_TD)).tolist())
    assert {0, 1, 2, 3, 4} <= counts


@pytest.mark.parametrize("images", [range(3), range(0)], ids=["three images", "no images"])
def test_experts_choose_without_a_cache(images: range) -> None:
    layer = make_layer()
    for step in range(NUM_STEPS):
        x_BTD = inputs(step, images)
        torch.testing.assert_close(layer(x_BTD), Loop(None).step(step, x_BTD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1])
def test_experts_choose_with_values_at_home(order: int) -> None:
    """Full steps, and cached ones in which some branches are new, some chosen and the others served."""
    loop = Loop(order)
    outputs, statistics = run_cached(make_layer(), order, range(3))
    for step, out_BTD in enumerate(outputs):
        torch.testing.assert_close(out_BTD, loop.step(step, inputs(step, range(3))), atol=1e-4, rtol=1e-4)
        total = sum(statistics.per_step(reason)[step, 0] for reason in Reason)
        assert total == 3 * EXPERTS * CHOSEN
    assert statistics.total(Reason.UNMATCHED) > 0 and statistics.total(Reason.SERVED) > 0
    assert sum(statistics.total(reason) for reason in REFRESHED) == loop.refreshed + statistics.total(Reason.FULL)


def on_a_rank(
    owners: tuple[int, ...], shares: list[range], order: int | None, *, at_owners: bool = False
) -> list[Tensor]:
    """On every rank: its own images through the all-to-all, in every step."""
    env = LauncherEnv.read()
    group = Mesh.create(env, device_type="cpu", timeout_s=60).expert_group
    assert group is not None
    placement = ExpertPlacement(owners, env.world_size)
    layer_class = OwnerMoELayer if at_owners else MoELayer
    layer = layer_class(ExpertsChoose(), make_experts(placement.experts_of(env.rank)), make_shared(), EXPERTS)
    layer.local_expert_ids = placement.experts_of(env.rank)
    layer.dispatcher = AllToAllDispatcher(group, placement)
    if order is None:
        return [layer(inputs(step, shares[env.rank])) for step in range(NUM_STEPS)]
    return run_cached(layer, order, shares[env.rank], env.world_size if at_owners else None)[0]


def at_owners_on_a_rank(owners: tuple[int, ...], shares: list[range]) -> list[Tensor]:
    return on_a_rank(owners, shares, 0, at_owners=True)


@pytest.mark.parametrize("shares", [[range(2), range(2, 3)], [range(0), range(3)]], ids=["both", "one without images"])
@pytest.mark.parametrize("owners", [(0, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1)], ids=["even", "one owns all"])
def test_experts_choose_with_values_at_the_owners(two_ranks: Any, owners: tuple[int, ...], shares: list[range]) -> None:
    """A token that loses an expert travels, though none of its branches is computed: its last sum holds too much."""
    loop, results = OwnerLoop(), two_ranks.run(at_owners_on_a_rank, owners, shares)
    for step in range(NUM_STEPS):
        found = torch.cat([outputs[step] for outputs in results])
        torch.testing.assert_close(found, loop.step(step, inputs(step, range(3))), atol=1e-4, rtol=1e-4)
    assert loop.served_after_a_drop > 0


@pytest.mark.parametrize("shares", [[range(2), range(2, 3)], [range(0), range(3)]], ids=["both", "one without images"])
@pytest.mark.parametrize("owners", [(0, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1)], ids=["even", "one owns all"])
@pytest.mark.parametrize("order", [None, 0, 1], ids=["exact", "reuse", "forecast"])
def test_experts_choose_on_two_ranks(
    two_ranks: Any, order: int | None, owners: tuple[int, ...], shares: list[range]
) -> None:
    loop, results = Loop(order), two_ranks.run(on_a_rank, owners, shares, order)
    for step in range(NUM_STEPS):
        found = torch.cat([outputs[step] for outputs in results])
        torch.testing.assert_close(found, loop.step(step, inputs(step, range(3))), atol=1e-4, rtol=1e-4)


# ---- experts given as modules ----------------------------------------------------------------------------------------


def as_modules() -> ExpertModules:
    """The same experts as ``make_experts(range(EXPERTS))``, one module each."""
    experts, weights = [], make_weights()
    for expert in range(EXPERTS):
        module = SwiGLU(HIDDEN, WIDTH)
        names = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}
        module.load_state_dict({name: weights[stacked][expert] for name, stacked in names.items()})
        experts.append(module)
    return ExpertModules(experts).requires_grad_(False)


@pytest.mark.parametrize("counts", [[3, 1, 0, 2, 0, 5], [0, 0, 0, 0, 0, 4], [0] * EXPERTS], ids=str)
def test_modules_give_what_stacked_weights_do(counts: list[int]) -> None:
    rows_RD = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1))
    found, expected = (
        experts(rows_RD, torch.tensor(counts)) for experts in (as_modules(), make_experts(range(EXPERTS)))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("owned", [(1, 4, 5), (0,), ()], ids=str)
def test_a_rank_keeps_its_own_modules(owned: tuple[int, ...]) -> None:
    experts = as_modules()
    experts.keep_only(owned)
    assert len(list(experts.parameters())) == 3 * len(owned)
    counts = torch.arange(1, len(owned) + 1)
    rows_RD = torch.randn(int(counts.sum()), HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(experts(rows_RD, counts), make_experts(owned)(rows_RD, counts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "run", [lambda layer: layer(inputs(0, range(3))), lambda layer: run_cached(layer, 1, range(3))[0]]
)
def test_a_layer_of_modules_is_one_of_stacked_weights(run: Callable[[MoELayer], Any]) -> None:
    torch.testing.assert_close(run(make_layer(as_modules())), run(make_layer()), atol=1e-4, rtol=1e-4)

"""The rules of single policies, each against a slow loop over its definition.

Shape suffixes: B images, T tokens (of one image with B, else of all), K routed experts per token, N branches, E
experts, D hidden size.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_dist.cache.branch_cache import BranchCache
from moeca_dist.cache.expert_usage import UsageHistory
from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.cache.policy import LayerView, ModuleView
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.cache.statistics import CacheStatistics, Reason
from moeca_dist.config import CacheConfig, HalvesConfig
from moeca_dist.errors import UserError
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.types import Routing, StepContext
from tests.cache.test_contract import CFG, NUM_STEPS, ForcedRouter, load, open_session, requests, sample

IMAGES, TOKENS, EXPERTS, K, HIDDEN = 2, 4, 5, 2, 3
DRIFTS = st.sampled_from(["signed", "absolute"])
STEP = StepContext(index=1, num_steps=NUM_STEPS, time=0.1)


def make_policy(**options: Any) -> Any:
    return build_policy(CacheConfig(**options), NUM_STEPS, guided=True)


def draw_routing(draw: torch.Generator) -> Routing:
    order = torch.rand(IMAGES * TOKENS, EXPERTS, generator=draw).argsort(-1)[:, :K]
    return Routing.top_k(order, torch.rand(IMAGES * TOKENS, K, generator=draw) + 0.1)


class Slow:
    """The state and the rule of MoECa, token by token, for one layer."""

    def __init__(self, drift: str) -> None:
        self.drift = drift
        self.entries: list[dict[int, tuple[float, float]]] = [{} for _ in range(IMAGES * TOKENS)]
        self.usage = [[[0.0] * TOKENS for _ in range(EXPERTS)] for _ in range(IMAGES)]

    def gates(self, routing: Routing, token: int) -> dict[int, float]:
        mine_N = routing.token_N == token
        return dict(zip(routing.expert_N[mine_N].tolist(), routing.gate_N[mine_N].tolist(), strict=True))

    def observe(self, routing: Routing) -> None:
        for token in range(routing.num_tokens):
            ids = self.gates(routing, token)
            for expert in range(EXPERTS):
                of = self.usage[token // TOKENS][expert]
                of[token % TOKENS] = 0.65 * of[token % TOKENS] + 0.35 * (expert in ids)

    def store(self, routing: Routing, values_ND: Tensor) -> None:
        for kept in self.entries:
            kept.clear()
        for token, expert, value_D in zip(routing.token_N.tolist(), routing.expert_N.tolist(), values_ND, strict=True):
            self.entries[token][expert] = (self.gates(routing, token)[expert], value_D.norm().item())

    def spread(self, image: int) -> list[float]:
        entropy: dict[int, float] = {}
        for expert, counts in enumerate(self.usage[image]):
            if sum(counts) > 0:
                shares = [count / sum(counts) for count in counts]
                entropy[expert] = -sum(share * math.log(share) for share in shares if share > 0)
        low, high = min(entropy.values()), max(entropy.values())
        if high - low <= 1e-5:
            return [0.5] * EXPERTS
        return [(entropy[e] - low) / (high - low) if e in entropy else 0.5 for e in range(EXPERTS)]

    def score_and_threshold(self, routing: Routing, token: int, expert: int) -> tuple[float, float]:
        """For a matched branch; the threshold is that of tau_0 = 1."""
        gate, (gate_0, norm) = self.gates(routing, token)[expert], self.entries[token][expert]
        drift = gate - gate_0
        if self.drift == "absolute":
            drift = abs(drift)
        share = norm / sum(other for _, other in self.entries[token].values())
        spread = self.spread(token // TOKENS)[expert]
        return gate + drift + 0.6 * share, 1 + 0.6 * (2 * spread - 1)


def moeca_case(drift: str, seed: int, **options: Any) -> tuple[Slow, Routing, LayerView, Any]:
    """Full steps, then a routing to decide on."""
    policy = make_policy(policy="moeca", drift=drift, **options)
    draw = torch.Generator().manual_seed(seed)
    slow, usage = Slow(drift), UsageHistory(policy.usage_decay, EXPERTS)
    cache = BranchCache(EXPERTS, REFERENCE, forecast=False, scored=True)
    for step in range(3):
        routing = draw_routing(draw)
        values_ND = torch.randn(IMAGES * TOKENS * K, HIDDEN, generator=draw)
        usage.observe(routing, IMAGES)
        cache.store_all(routing, cache.match(routing), values_ND, step)
        slow.observe(routing)
        slow.store(routing, values_ND)
    routing = draw_routing(draw)
    slow.observe(routing)
    usage.observe(routing, IMAGES)
    match = cache.match(routing)
    view = view_of(routing, match.found_N, IMAGES, scores=cache.scores(routing, match), usage_BTE=usage.usage_BTE)
    return slow, routing, view, policy


def view_of(routing: Routing, found_N: Tensor, num_images: int = 1, **seen: Any) -> LayerView:
    image_ids_B = torch.arange(num_images)
    return LayerView(1, routing, found_N, image_ids_B, torch.zeros_like(image_ids_B), **seen)


def refreshed(policy: Any, view: LayerView) -> Tensor:
    """Bool [N]: what a cached step computes, unmatched branches and the policy's choice."""
    chosen_N = policy.refresh(STEP, view)
    return ~view.found_N if chosen_N is None else ~view.found_N | chosen_N


@given(drift=DRIFTS, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_moeca_scores_branches_and_experts_as_the_paper_defines(drift: str, seed: int) -> None:
    slow, routing, view, policy = moeca_case(drift, seed)
    refresh_N = refreshed(policy, view)
    for branch, (token, expert) in enumerate(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)):
        if expert not in slow.entries[token]:
            assert refresh_N[branch]
            continue
        score, unit = slow.score_and_threshold(routing, token, expert)
        assert policy.score(view)[branch].item() == pytest.approx(score, rel=1e-4, abs=1e-5)
        assert policy.leniency(view)[branch].item() == pytest.approx(unit, rel=1e-3)


@given(drift=DRIFTS, ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_refresh_ratio_takes_the_highest_scores_of_each_image(drift: str, ratio: float, seed: int) -> None:
    slow, routing, view, policy = moeca_case(drift, seed, refresh_ratio=ratio)
    refresh_N = refreshed(policy, view)
    for image in range(IMAGES):
        matched: list[tuple[float, bool]] = []
        for branch, (token, expert) in enumerate(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)):
            if token // TOKENS == image and expert in slow.entries[token]:
                score, unit = slow.score_and_threshold(routing, token, expert)
                matched.append((score / unit, bool(refresh_N[branch])))
        chosen = [relative for relative, refreshed in matched if refreshed]
        left = [relative for relative, refreshed in matched if not refreshed]
        assert len(chosen) == min(len(matched), round(ratio * TOKENS * K))
        assert not chosen or not left or min(chosen) >= max(left) - 1e-3


def test_local_experts_get_lower_thresholds() -> None:
    usage = UsageHistory(0.65, 3)
    # Expert 0 serves one position, expert 1 all of them; expert 2 is never used.
    usage.observe(listed([[0, 1], [1], [1], [1]]), 1)
    policy, routing = make_policy(policy="moeca"), listed([[0, 1, 2]])
    view = view_of(routing, torch.ones(3, dtype=torch.bool), usage_BTE=usage.usage_BTE)
    assert policy.leniency(view).tolist() == pytest.approx([0.4, 1.6, 1.0])


def listed(experts_of_tokens: list[list[int]], gates: list[float] | None = None) -> Routing:
    """The routing in which each token has the given experts, with gates of 1 unless stated."""
    token_N = torch.tensor([token for token, experts in enumerate(experts_of_tokens) for _ in experts])
    expert_N = torch.tensor([expert for experts in experts_of_tokens for expert in experts])
    gate_N = torch.ones(len(token_N)) if gates is None else torch.tensor(gates)
    return Routing.listed(token_N, expert_N, gate_N, len(experts_of_tokens))


@pytest.mark.parametrize("name", ["dit_moe_flash", "dsmoe_e8"])
@pytest.mark.parametrize("policy", [{"policy": "moeca", "refresh_ratio": 1.0}, {"policy": "random", "ratio": 1.0}])
def test_refreshing_every_branch_with_its_attention_is_the_exact_path(policy, name: str, tmp_path: Path) -> None:
    """The router must not see stale attention for that, and block 0 must not be dense: both are switched off."""
    model = load(name, tmp_path)
    for _, layer in model.moe_layers():
        layer.gate = ForcedRouter(layer.gate)
    torch.nn.init.zeros_(model.blocks[0].adaLN_modulation[1].weight)
    torch.nn.init.zeros_(model.blocks[0].adaLN_modulation[1].bias)
    expected, _ = sample(model, None, requests(3))
    images, session = sample(model, CacheConfig(interval=4, attention_sync=True, **policy), requests(3))
    assert session.statistics.total(Reason.SERVED) == 0
    assert ((images - expected).norm() / expected.norm()).item() <= 1e-5
    stale, _ = sample(model, CacheConfig(interval=4, attention_sync=False, **policy), requests(3))
    assert ((stale - expected).norm() / expected.norm()).item() > 1e-4


@pytest.mark.parametrize("policy", ["fora", "toca", "moeca", "moeca_forecast", "random"])
def test_a_half_that_is_full_is_exact_beside_one_that_is_not(policy: str, tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    halves = HalvesConfig(conditional=[0, 1], unconditional=[0])
    sync = {} if policy in ("fora", "toca") else {"attention_sync": True}
    session = open_session(model, CacheConfig(policy=policy, full_steps=halves, **sync), requests(2))
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 2, model.spec.null_label, model.spec.null_label])
    for index in range(2):
        spec = model.spec
        x = torch.randn(4, spec.in_channels, spec.input_size, spec.input_size, generator=draw)
        t = torch.full((4,), index / 10)
        expected = model(x, t, labels)
        found = model(x, t, labels, session.at(StepContext(index, NUM_STEPS, index / 10)))
    assert ((found[:2] - expected[:2]).norm() / expected[:2].norm()).item() <= 1e-5
    assert ((found[2:] - expected[2:]).norm() / expected[2:].norm()).item() > 1e-4


@pytest.mark.parametrize(("interval", "num_steps"), [(4, 50), (2, 50), (4, 250), (3, 7), (1, 5)])
def test_the_schedule_of_toca(interval: int, num_steps: int) -> None:
    found = sorted(FullSteps.toca(interval, num_steps).conditional)
    assert found[0] == 0
    for before, after in zip(found, [*found[1:], None], strict=True):
        for index in range(before + 1, after + 1 if after else num_steps):
            left = num_steps - 1 - index
            forced = 0.2 * num_steps <= left < 0.4 * num_steps
            gap = 2 if forced else round(interval / (1.4 - 0.8 * left / num_steps))
            assert (index - before >= gap) == (index == after)


@given(ratio=st.floats(0, 1), side=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_toca_scores_by_norm_age_and_place(ratio: float, side: int, seed: int) -> None:
    policy = make_policy(policy="toca", interval=4, ratio=ratio)
    draw = torch.Generator().manual_seed(seed)
    value_BTD = torch.randn(2, side * side, HIDDEN, generator=draw)
    age_BT = torch.randint(1, 6, (2, side * side), generator=draw, dtype=torch.int32)
    view = ModuleView(value_BTD, age_BT)
    chosen_BT = policy.tokens(view)
    for image in range(2):
        norms = [row.norm().item() for row in value_BTD[image]]
        total = math.sqrt(sum(norm**2 for norm in norms))
        plain = [norm / total + 0.25 * age / 4 for norm, age in zip(norms, age_BT[image].tolist(), strict=True)]
        expected = list(plain)
        for row in range(0, side, 2):
            for column in range(0, side, 2):
                block = [r * side + c for r in (row, row + 1) for c in (column, column + 1) if r < side and c < side]
                best = max(block, key=lambda token: plain[token])
                expected[best] *= 1.4
        assert policy.score(view)[image].tolist() == pytest.approx(expected, rel=1e-5)
        order = sorted(range(side * side), key=lambda token: -expected[token])
        assert set(chosen_BT[image].nonzero().flatten().tolist()) == set(order[: round(ratio * side * side)])


def test_toca_computes_the_chosen_share_of_tokens(tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    _, session = sample(model, CacheConfig(policy="toca", full_steps=[0, 4], ratio=0.25), requests(2))
    tokens, moe_layers = model.spec.num_tokens, len(model.spec.moe_blocks)
    per_step = 2 * 2 * moe_layers
    counts = session.statistics.modules
    assert counts["moe"] == per_step * (2 * tokens + (NUM_STEPS - 2) * round(0.25 * tokens))
    assert counts["attention"] == 2 * 2 * model.spec.depth * 2 * tokens


def test_dice_serves_only_the_lowest_gates(tmp_path: Path) -> None:
    model = load("dsmoe_e12", tmp_path)
    _, session = sample(model, CacheConfig(policy="dice_skip"), requests(2))
    statistics = session.statistics
    branches = 2 * 2 * model.spec.num_tokens
    for block in model.spec.moe_blocks:
        for step in range(NUM_STEPS):
            if step % 2 == 0:
                assert statistics.per_step(Reason.FULL)[step, block] == branches * model.spec.num_experts_per_tok
            else:
                assert 0 < statistics.per_step(Reason.SERVED)[step, block] <= branches
                # The skipped branch alone is judged: the others are computed by rule, or because they are new.
                assert statistics.per_step(Reason.SCORE)[step, block] == 0
                assert statistics.per_step(Reason.FORCED)[step, block] > 0
    assert statistics.modules["attention"] == NUM_STEPS * 2 * 2 * model.spec.num_tokens * model.spec.depth


def test_dice_serves_one_branch_of_equal_gates() -> None:
    """The first of the lowest ones, and of a token with one branch that one."""
    policy = make_policy(policy="dice_skip")
    routing = listed(
        [[3, 1, 2], [], [0, 4], [2], [4, 0, 1, 3]], [0.5, 0.25, 0.25, 1.0, 1.0, 0.5, 0.25, 0.5, 0.25, 0.25]
    )
    refresh_N = policy.refresh(STEP, view_of(routing, torch.ones(10, dtype=torch.bool)))
    assert (~refresh_N).nonzero().flatten().tolist() == [1, 3, 5, 6]


@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_dice_serves_the_first_of_the_lowest_gates_of_any_routing(seed: int, tokens: int) -> None:
    """Gates of few values, so that many are equal; against a loop over the tokens."""
    draw = torch.Generator().manual_seed(seed)
    token_N = torch.arange(tokens).repeat_interleave(torch.randint(0, EXPERTS + 1, (tokens,), generator=draw))
    gate_N = torch.randint(1, 4, token_N.shape, generator=draw) / 4
    routing = Routing.listed(token_N, torch.zeros_like(token_N), gate_N, tokens)
    expected = []
    for token in range(tokens):
        mine = (token_N == token).nonzero().flatten().tolist()
        expected += [min(mine, key=lambda branch: gate_N[branch].item())] if mine else []
    refresh_N = make_policy(policy="dice_skip").refresh(STEP, view_of(routing, torch.ones_like(token_N).bool()))
    assert (~refresh_N).nonzero().flatten().tolist() == expected


def test_teacache_decides_from_the_time_alone(tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    config = CacheConfig(policy="teacache", delta=0.008)
    skipped = []
    for wanted in (requests(3), requests(1, first=7), []):
        ran: list[int] = []
        hook = model.blocks[1].register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        _, session = sample(model, config, wanted)
        hook.remove()
        assert session.statistics.skipped == (NUM_STEPS - len(ran)) * 2 * len(wanted)
        skipped.append(len(ran))
    assert len(set(skipped)) == 1 and 1 < skipped[0] < NUM_STEPS


def test_teacache_adds_the_last_change_to_the_input(tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    session = open_session(model, CacheConfig(policy="teacache", delta=1e6), requests(2), cfg=1.0)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    spec, labels = model.spec, torch.tensor([1, 2])
    for index in range(2):
        x = torch.full((2, spec.in_channels, spec.input_size, spec.input_size), 0.5 + index)
        model(x, torch.full((2,), index / 10), labels, session.at(StepContext(index, NUM_STEPS, index / 10)))
    entered, left, served = seen
    embedded, _ = model.add_positions(model.x_embedder(x), *[spec.input_size // spec.patch_size] * 2)
    torch.testing.assert_close(served, embedded + (left - entered))


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"policy": "moeca", "refresh_ratio": 0.0}, None),
        ({"policy": "moeca", "refresh_ratio": 1e-6}, "refresh_ratio 1e-06 chose nothing"),
        ({"policy": "moeca"}, None),
        ({"policy": "toca", "ratio": 1e-6}, "cache.ratio 1e-06 chose nothing"),
        ({"policy": "toca"}, None),
        ({"policy": "toca", "full_steps": list(range(8))}, None),
        ({"policy": "teacache", "delta": 1e9}, "skipped every step but the first"),
        ({"policy": "teacache", "delta": 1e-9}, "never skipped a step"),
        ({"policy": "teacache", "delta": 0.008}, None),
        ({"policy": "fora"}, None),
    ],
)
def test_thresholds_without_effect_are_remarked(options: dict[str, Any], remark: str | None, tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    _, session = sample(model, CacheConfig(**options), requests(2))
    merged = CacheStatistics()
    merged.merge(session.statistics)
    said = session.policy.remark(merged)
    assert said is None if remark is None else remark in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "moeca", "ratio": 0.5}, "cache.ratio has no effect with cache.policy moeca"),
        ({"policy": "fora", "attention_sync": True}, "cache.attention_sync has no effect with cache.policy fora"),
        ({"policy": "teacache", "interval": 3}, "cache.interval has no effect with cache.policy teacache"),
        ({"policy": "random", "refresh_ratio": 0.5}, "cache.refresh_ratio has no effect with cache.policy random"),
    ],
)
def test_contradicting_knobs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_policy(CacheConfig(**options), NUM_STEPS, guided=CFG != 1)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_network_forecast_extrapolates_what_the_blocks_add(order: int, tmp_path: Path) -> None:
    """Halves with schedules of their own, against TaylorSeer's differences over the computed changes."""
    model = load("dsmoe_e8", tmp_path)
    steps = {"conditional": [0, 2, 3, 5], "unconditional": [0, 4]}
    config = CacheConfig(policy="network_forecast", full_steps=HalvesConfig(**steps), order=order)
    session = open_session(model, config, requests(1))
    entered: list[Tensor] = []
    left: list[Tensor] = []
    model.x_embedder.register_forward_hook(lambda *args: entered.append(args[2]))
    model.final_layer.register_forward_pre_hook(lambda _, inputs: left.append(inputs[0]))
    spec, side = model.spec, model.spec.input_size // model.spec.patch_size
    draw = torch.Generator().manual_seed(0)
    computed: dict[str, list[tuple[int, Tensor]]] = {half: [] for half in steps}
    for index in range(7):
        x = torch.randn(2, spec.in_channels, spec.input_size, spec.input_size, generator=draw)
        t, labels = torch.full((2,), index / 10), torch.tensor([1, spec.null_label])
        model(x, t, labels, session.at(StepContext(index, NUM_STEPS, index / 10)))
        served = left[-1] - model.add_positions(entered[-1], side, side)[0]
        model(x, t, labels)
        exact_change = left[-1] - model.add_positions(entered[-1], side, side)[0]
        for row, (half, full) in enumerate(steps.items()):
            if index in full:
                computed[half].append((index, exact_change[row]))
            expected = taylor_forecast(computed[half][::-1][: order + 1], index)
            torch.testing.assert_close(served[row], expected, rtol=1e-3, atol=1e-4)
    assert session.statistics.skipped == sum(7 - len(full) for full in steps.values())


def taylor_forecast(points: list[tuple[int, Tensor]], at: int) -> Tensor:
    """TaylorSeer's forecast from computed values, newest first: difference of order k weighted with distance^k / k!."""
    distance = at - points[0][0]
    differences = enumerate(taylor_differences(points))
    return sum((distance**k / math.factorial(k) * part for k, part in differences), torch.zeros_like(points[0][1]))


def taylor_differences(points: list[tuple[int, Tensor]]) -> list[Tensor]:
    """Differences of order 0, 1, ... at the newest point, each over the step to the point before."""
    if len(points) == 1:
        return [points[0][1]]
    older = taylor_differences(points[1:])
    found = [points[0][1]]
    for before in older:
        found.append((found[-1] - before) / (points[0][0] - points[1][0]))
    return found

"""What every caching policy promises: nothing changes until something is reused, and nothing leaks.

Shape suffixes: N images, T tokens, K routed experts per token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_dist import load_model
from moeca_dist.cache.policies.registry import POLICIES, build_policy
from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import REFRESHED, CacheStatistics, Reason
from moeca_dist.config import CacheConfig, HalvesConfig
from moeca_dist.errors import UserError
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.moe.router import Router
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.report.figures import RunFigures
from moeca_dist.sampling.guidance import cached, exact
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request, Routing, StepContext
from tests.helpers.golden_files import load_golden

NUM_STEPS, CFG = 8, 1.5
FULL_STEPS = [0, 1, 4]
APART = HalvesConfig(conditional=[0, 1, 3, 5], unconditional=[0, 4])


@pytest.fixture(params=["dsmoe_e8", "dsmoe_e12", "dit_moe_flash"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def load(name: str, folder: Path, mesh: Mesh | None = None) -> DiffusionTransformer:
    golden = load_golden(name)
    path = folder / f"{name}.safetensors"
    if not path.exists():
        golden.write_checkpoint(path)
    return load_model(path, mesh=mesh, **golden.options)


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request(first + index, (first + index) % 10, seed=3) for index in range(count)]


def open_session(
    model: DiffusionTransformer, config: CacheConfig, wanted: list[Request], cfg: float = CFG
) -> CacheSession:
    policy = build_policy(config, NUM_STEPS, guided=cfg != 1)
    assert policy is not None
    return CacheSession(
        policy,
        wanted,
        guided=cfg != 1,
        num_blocks=model.spec.depth,
        num_experts=model.spec.num_experts,
        statistics=CacheStatistics(),
    )


def sample(
    model: DiffusionTransformer, config: CacheConfig | None, wanted: list[Request], cfg: float = CFG
) -> tuple[Tensor, CacheSession | None]:
    session = None if config is None else open_session(model, config, wanted, cfg)
    network = exact(model) if session is None else cached(model, session)
    images = sampler_for(model.spec).sample(network, wanted, cfg_scale=cfg, num_steps=NUM_STEPS)
    return images, session


def scheduled(policy: str, **options: Any) -> CacheConfig:
    placed = {"delta": 0.008} if policy == "teacache" else {"full_steps": FULL_STEPS}
    return CacheConfig(policy=policy, **placed, **options)


def never_reusing(policy: str) -> CacheConfig:
    placed = {"delta": 0.0} if policy == "teacache" else {"full_steps": list(range(NUM_STEPS))}
    return CacheConfig(policy=policy, **placed)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_that_never_reuses_is_bit_identical(policy: str, cfg: float, name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    expected, _ = sample(model, None, requests(3), cfg)
    images, _ = sample(model, never_reusing(policy), requests(3), cfg)
    assert torch.equal(images, expected)


def test_refreshing_every_branch_in_cache_steps_with_fresh_modules_is_the_full_step(tmp_path: Path) -> None:
    """ratio 1 computes all branches one by one: the masked path, on the forecast attention."""
    model = load("dsmoe_e8", tmp_path)
    every, session = sample(model, scheduled("random", ratio=1.0), requests(3))
    counts = session.statistics
    assert counts.total(Reason.SERVED) == 0 and counts.total(Reason.SCORE) + counts.total(Reason.UNMATCHED) > 0
    none, _ = sample(model, scheduled("random", ratio=0.0), requests(3))
    assert not torch.equal(every, none)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_does_not_depend_on_its_batch(policy: str, name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    whole, _ = sample(model, scheduled(policy), requests(5))
    alone, _ = sample(model, scheduled(policy), requests(1, first=3))
    assert ((alone[0] - whole[3]).norm() / whole[3].norm()).item() <= 1e-5


@pytest.mark.parametrize("policy", POLICIES)
def test_consecutive_requests_share_nothing(policy: str, tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    first, _ = sample(model, scheduled(policy), requests(3))
    sample(model, scheduled(policy), requests(4, first=20))
    again, _ = sample(model, scheduled(policy), requests(3))
    assert torch.equal(first, again)


def test_guidance_halves_with_schedules_of_their_own_share_nothing(tmp_path: Path) -> None:
    """The conditional half's schedule cannot change what the unconditional half's caches hold."""
    model = load("dsmoe_e8", tmp_path)
    session = open_session(model, CacheConfig(policy="moeca_forecast", full_steps=APART), requests(2))
    sampler_for(model.spec).sample(cached(model, session), requests(2), cfg_scale=CFG, num_steps=NUM_STEPS)
    assert [part.images for part in session.parts] == [slice(0, 2), slice(2, 4)]
    for index in range(model.spec.depth):
        conditional, unconditional = (part.blocks[index] for part in session.parts)
        assert conditional is not unconditional and conditional.branches is not unconditional.branches
        assert set(conditional.modules) == set(unconditional.modules)


@pytest.mark.parametrize("policy", POLICIES)
def test_guidance_halves_in_one_part_share_nothing(policy: str, tmp_path: Path) -> None:
    """Halves that are full in the same steps lie in the same caches, and still know nothing of each other."""
    model = load("dsmoe_e8", tmp_path)
    spec, found = model.spec, []
    for conditional in (1, 2):
        session = open_session(model, scheduled(policy), requests(2))
        assert len(session.parts) == (0 if policy in ("teacache", "network_forecast") else 1)
        labels = torch.tensor([conditional, conditional, spec.null_label, spec.null_label])
        draw = torch.Generator().manual_seed(0)
        for index in range(NUM_STEPS):
            x = torch.randn(4, spec.in_channels, spec.input_size, spec.input_size, generator=draw)
            out = model(x, torch.full((4,), index / 10), labels, session.at(StepContext(index, NUM_STEPS, index / 10)))
            found.append(out)
    for one, other in zip(found[:NUM_STEPS], found[NUM_STEPS:], strict=True):
        torch.testing.assert_close(one[2:], other[2:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one[:2], other[:2], rtol=1e-5, atol=1e-5)


def test_halves_may_have_different_schedules(tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    halves = HalvesConfig(conditional=[0, 1, 3, 5, 7], unconditional=[0, 1, 5])
    _, session = sample(model, CacheConfig(policy="moeca_forecast", full_steps=halves), requests(2))
    per_half = 2 * model.spec.num_tokens * model.spec.num_experts_per_tok
    full = {step: session.statistics.per_step(Reason.FULL)[step, 1] for step in range(NUM_STEPS)}
    assert full == {0: 2 * per_half, 1: 2 * per_half, 2: 0, 3: per_half, 4: 0, 5: 2 * per_half, 6: 0, 7: per_half}
    everything, _ = sample(model, None, requests(2))
    both = HalvesConfig(conditional=list(range(8)), unconditional=list(range(8)))
    identical, _ = sample(model, CacheConfig(policy="moeca_forecast", full_steps=both), requests(2))
    assert torch.equal(identical, everything)


class ForcedRouter(torch.nn.Module):
    """Routes as told, so that a test can change the routing of single tokens."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router = router
        self.swap_T: Tensor | None = None

    def forward(self, x_TD: Tensor) -> Any:
        routing = self.router(x_TD * 0 + 1)  # the same experts for all tokens, in all steps
        if self.swap_T is None:
            return routing
        ids_TK = routing.expert_N.clone().view(routing.num_tokens, -1)
        unused = next(expert for expert in range(8) if expert not in ids_TK[0].tolist())
        ids_TK[self.swap_T, 0] = unused
        return Routing.top_k(ids_TK, routing.gate_N.view_as(ids_TK))


def test_a_routing_change_refreshes_exactly_the_changed_branches(tmp_path: Path) -> None:
    model = load("dsmoe_e8", tmp_path)
    block, layer = next(model.moe_layers())
    layer.gate = ForcedRouter(layer.gate)
    rows: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    session = open_session(model, scheduled("moeca_forecast"), requests(2))

    def network(x: Tensor, t: Tensor, y: Tensor, step: Any) -> Tensor:
        layer.gate.swap_T = torch.tensor([5, 17, 40]) if step.index in (2, 3) else None
        return model(x, t, y, session.at(step))

    sampler_for(model.spec).sample(network, requests(2), cfg_scale=CFG, num_steps=NUM_STEPS)
    everything = 2 * 2 * model.spec.num_tokens * model.spec.num_experts_per_tok
    # Changed in step 2 and back after the full step 4 stored the old experts again; unchanged in between.
    assert rows == [everything, everything, 3, 0, everything, 0, 0, 0]
    unmatched = {step: session.statistics.per_step(Reason.UNMATCHED)[step, block] for step in range(NUM_STEPS)}
    assert unmatched == {step: 3 if step == 2 else 0 for step in range(NUM_STEPS)}


def spread(policy: str, name: str, folder: Path, ep_size: int, count: int) -> dict[str, Any]:
    env = LauncherEnv.read()
    mesh = Mesh.create(env, ep_size=ep_size, device_type="cpu", timeout_s=60)
    model = load(name, folder, mesh)
    mine = [request for request in requests(count) if request.index % env.world_size == env.rank]
    if mesh.expert_group is not None:
        mesh.expert_group.reset_traffic()
    images, session = sample(model, scheduled(policy), mine)
    traffic = mesh.expert_group.traffic if mesh.expert_group is not None else None
    return {
        "images": {request.index: image for request, image in zip(mine, images, strict=True)},
        "statistics": session.statistics,
        "traffic": traffic,
    }


@pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_images_do_not_depend_on_the_ranks(request, policy: str, world: tuple[int, int], tmp_path: Path) -> None:
    """Three images: on four ranks, one of them has none and still takes part."""
    num_ranks, ep_size = world
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    expected, session = sample(load("dsmoe_e12", tmp_path), scheduled(policy), requests(3))
    results = pool.run(spread, policy, "dsmoe_e12", tmp_path, ep_size, 3)
    images = {index: image for result in results for index, image in result["images"].items()}
    found = torch.stack([images[index] for index in range(3)])
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5
    together = CacheStatistics()
    for result in results:
        together.merge(result["statistics"])
    assert all(together.per_step(reason) == session.statistics.per_step(reason) for reason in REFRESHED)


def test_module_policies_issue_no_collective_in_cache_steps(two_ranks, tmp_path: Path) -> None:
    load("dsmoe_e8", tmp_path)
    for result in two_ranks.run(spread, "fora", "dsmoe_e8", tmp_path, 2, 3):
        assert result["traffic"].collectives == len(FULL_STEPS) * 2 * 2  # steps x MoE layers x legs
        assert result["traffic"].collectives_skipped == 0


COUNTED = [
    *(scheduled(policy) for policy in POLICIES),
    *(
        scheduled(policy, attention_sync=sync)
        for policy in ("moeca", "moeca_forecast", "random")
        for sync in (False, True)
    ),
    *(CacheConfig(policy=policy, full_steps=APART) for policy in ("moeca", "toca", "fora")),
]


@pytest.mark.parametrize(
    "config", COUNTED, ids=lambda c: f"{c.policy}-{c.attention_sync}-{type(c.full_steps).__name__}"
)
@pytest.mark.parametrize("network", ["dsmoe_e8", "dit_moe_flash"])
def test_counted_flops_are_those_of_the_matrix_products(
    config: CacheConfig, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent count: hooks on every linear layer, on the experts and on attention."""
    model = load(network, tmp_path)
    counted = count_products(model, monkeypatch)
    _, session = sample(model, config, requests(3))
    work = RunFigures(model.spec, 3 * 2 * NUM_STEPS, session.policy, session.statistics)
    assert work.flops().computed == sum(counted)
    assert work.flops().speedup > (1.0 if config.policy == "dice_skip" else 1.3)


def count_products(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    spec = model.spec
    attend = torch.nn.functional.scaled_dot_product_attention

    def linear(module: torch.nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        counted.append(2 * inputs[0].numel() // module.in_features * module.in_features * module.out_features)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counted.append(2 * 2 * q.numel() * k.shape[-2])
        return attend(q, k, v)

    def experts(module: torch.nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        counted.append(6 * inputs[0].shape[0] * spec.hidden_size * spec.expert_width)

    def scores(router: Router) -> Callable[[Tensor], Tensor]:
        compute = router.scores

        def counting(x_TD: Tensor) -> Tensor:
            counted.append(2 * x_TD.shape[0] * spec.hidden_size * spec.num_experts)
            return compute(x_TD)

        return counting

    def patches(module: torch.nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counted.append(2 * output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for _, layer in model.moe_layers():
        layer.experts.register_forward_hook(experts)
        layer.gate.scores = scores(layer.gate)
    model.x_embedder.proj.register_forward_hook(patches)
    return counted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "none", "interval": 3}, "cache.interval has no effect with cache.policy none"),
        ({"policy": "fora", "ratio": 0.1}, "cache.ratio has no effect with cache.policy fora, which reads full_steps"),
        ({"policy": "fora", "interval": 2, "full_steps": [0]}, "both place the full steps"),
        ({"policy": "fora", "full_steps": [1, 2]}, "must contain 0"),
        ({"policy": "fora", "full_steps": [0, 8]}, r"names 8, but the steps are 0\.\.7"),
        ({"policy": "moeca_forecast", "order": 2}, "forecasts branches with order 0 or 1"),
        ({"policy": "moeca", "location": "owner"}, "policy moeca scores stored branches at home; use home"),
        ({"policy": "teacache", "location": "owner"}, "teacache, which keeps no branches"),
    ],
)
def test_contradicting_knobs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_policy(CacheConfig(**options), NUM_STEPS, guided=True)


def test_two_schedules_need_guidance() -> None:
    halves = HalvesConfig(conditional=[0], unconditional=[0])
    with pytest.raises(UserError, match=r"has no effect at sampling.cfg_scale 1"):
        build_policy(CacheConfig(policy="fora", full_steps=halves), NUM_STEPS, guided=False)

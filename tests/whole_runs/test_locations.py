"""Both locations of branch values in whole networks: the same images where they must be, and what is reported.

Images are compared as float latents, relative L2 in fp32.
"""

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeca_dist import Engine, Report, Request, UserError
from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.config import CacheConfig, Config
from moeca_dist.moe.value_location import choose_location
from moeca_dist.parallel.all_to_all import SUM_HEADER_BYTES
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.types import Routing
from tests.helpers.golden_files import load_golden

TOLERANCE = 1e-5
NUM_STEPS = 8
BRANCH_POLICIES = ("moeca_forecast", "random")
WORLDS = pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def make_config(model: dict[str, Any], cache: dict[str, Any], ep_size: int | None = None) -> Config:
    sampling = {"num_steps": NUM_STEPS, "cfg_scale": 1.5, "batch_size": 2}
    return Config.model_validate(
        {"model": model, "parallel": {"ep_size": ep_size}, "cache": cache, "sampling": sampling}
    )


class ConstantGates(torch.nn.Module):
    """The router's experts, all with the same gate."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_TD: Tensor) -> Routing:
        routing = self.router(x_TD)
        return replace(routing, gate_N=torch.full_like(routing.gate_N, 0.7))


def generate(config: Config, constant_gates: bool = False, times: int = 1) -> tuple[NDArray[np.generic], Report, int]:
    """Runs on every rank of a pool, or alone: five images (seven requests before, if asked twice), and a recount.

    The third item: what this rank's routings send away and bring back without a cache, counted by hooks.
    """
    env = LauncherEnv.read()
    mesh = Mesh.create(env, ep_size=config.parallel.ep_size, device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    routed_away: list[int] = []

    def count(_: torch.nn.Module, __: Any, routing: Routing) -> None:
        held = ExpertPlacement.contiguous(engine.model.spec.num_experts, mesh.ep_size).owner_of_expert
        owners = [held[expert] for expert in routing.expert_N.tolist()]
        away = [pair for pair in zip(routing.token_N.tolist(), owners, strict=True) if pair[1] != mesh.ep_rank]
        branches, pairs = len(away), len(set(away))
        routed_away.append(branches * SUM_HEADER_BYTES + pairs * 2 * engine.model.spec.hidden_size * 4)

    for _, layer in engine.model.moe_layers():
        if constant_gates:
            layer.gate = ConstantGates(layer.gate)
        layer.gate.register_forward_hook(count)
    for _ in range(times - 1):
        engine.generate([Request(30 + index, index, seed=2) for index in range(7)])
    routed_away.clear()
    images, report = engine.generate([Request(index, index % 10, seed=7) for index in range(5)])
    return images, report, sum(routed_away)


def difference(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def ranks(request: pytest.FixtureRequest):
    return lambda count: request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[count])


@WORLDS
@pytest.mark.parametrize(
    ("policy", "location"),
    [*product((*BRANCH_POLICIES, "dice_skip"), ("home", "owner")), ("moeca", "home")],
)
def test_zero_reuse_is_the_exact_path(ranks, model, policy: str, location: str, world: tuple[int, int]) -> None:
    """Bit for bit: the owners' sums, and those that home makes of single branches, are the exact path's."""
    pool = ranks(world[0])
    expected, exact, _ = pool.run(generate, make_config(model, {}, world[1]))[0]
    cache = {"policy": policy, "interval": 1, "location": location}
    images, report, _ = pool.run(generate, make_config(model, cache, world[1]))[0]
    assert np.array_equal(images, expected)
    assert report.exchange.location == location and exact.exchange.location is None
    assert report.exchange.bytes_full == exact.exchange.bytes_full == exact.exchange.bytes_sent
    assert report.exchange.bytes_sent > report.exchange.bytes_full


@pytest.mark.parametrize("location", ["home", "owner", "auto"])
@pytest.mark.parametrize("policy", BRANCH_POLICIES)
def test_one_rank_is_bit_identical_and_has_no_location(model, policy: str, location: str) -> None:
    expected, _, _ = generate(make_config(model, {}))
    images, report, _ = generate(make_config(model, {"policy": policy, "interval": 1, "location": location}))
    assert np.array_equal(images, expected)
    assert (report.exchange.location, report.exchange.bytes_full) == (None, 0)


def test_half_precision(two_ranks, model) -> None:
    """Rows travel in bf16 and gates in fp32; the locations differ by what adding in another order rounds away."""
    images = {}
    for location in ("home", "owner"):
        cache = {"policy": "moeca_forecast", "interval": 1, "location": location}
        config = make_config(model | {"dtype": "bfloat16"}, cache)
        images[location], report, _ = two_ranks.run(generate, config)[0]
        assert report.exchange.bytes_sent > report.exchange.bytes_full > 0
    assert difference(images["owner"], images["home"]) < 0.05


@WORLDS
@pytest.mark.parametrize("options", [{"policy": "moeca_forecast"}, {"policy": "random", "ratio": 0.2}], ids=str)
def test_both_locations_reuse_alike(ranks, model, options: dict[str, Any], world: tuple[int, int]) -> None:
    """Order 0 and gates that do not change: a stored sum is the sum of the stored branches."""
    results = {}
    for location in ("home", "owner"):
        cache = {"order": 0, "full_steps": [0, 4], "location": location, **options}
        results[location] = ranks(world[0]).run(generate, make_config(model, cache, world[1]), True)[0]
    home, owner = results["home"], results["owner"]
    assert difference(owner[0], home[0]) <= TOLERANCE
    assert owner[1].branches == home[1].branches and owner[1].flops == home[1].flops
    assert home[1].branches.reused > 0 and owner[1].exchange.bytes_full == home[1].exchange.bytes_full


@pytest.mark.parametrize("policy", BRANCH_POLICIES)
def test_forecasts_differ_by_a_little(two_ranks, model, policy: str) -> None:
    """With moving gates and a forecast, untouched tokens are extrapolated as sums: close to home, but not the same."""
    exact, _, _ = two_ranks.run(generate, make_config(model, {}))[0]
    errors = {}
    for location in ("home", "owner"):
        cache = {"policy": policy, "order": 1, "full_steps": [0, 1, 4], "location": location}
        images, _, _ = two_ranks.run(generate, make_config(model, cache))[0]
        errors[location] = difference(images, exact)
    assert TOLERANCE < errors["owner"] < 1.5 * errors["home"], errors


@pytest.mark.parametrize("policy", BRANCH_POLICIES)
def test_owner_images_do_not_depend_on_the_ranks(two_ranks, four_ranks, model, policy: str) -> None:
    cache = {"policy": policy, "full_steps": [0, 1, 4], "location": "owner"}
    results = [
        pool.run(generate, make_config(model, cache, ep_size))[0]
        for pool, ep_size in ((two_ranks, 2), (four_ranks, 4), (four_ranks, 2))
    ]
    for (one, its_report, _), (other, report, _) in combinations(results, 2):
        assert difference(one, other) <= TOLERANCE
        assert its_report.branches == report.branches and its_report.flops == report.flops


@pytest.mark.parametrize("policy", BRANCH_POLICIES)
def test_consecutive_requests_share_nothing(two_ranks, model, policy: str) -> None:
    config = make_config(model, {"policy": policy, "full_steps": [0, 1, 4], "location": "owner"})
    fresh, _, _ = two_ranks.run(generate, config)[0]
    later, _, _ = two_ranks.run(generate, config, False, 2)[0]
    assert np.array_equal(fresh, later)


@pytest.mark.parametrize("location", ["home", "owner"])
def test_bytes_of_the_exact_path_follow_the_routing(two_ranks, model, location: str) -> None:
    cache = {"policy": "moeca_forecast", "full_steps": [0, 1, 4], "location": location}
    results = two_ranks.run(generate, make_config(model, cache))
    report = results[0][1]
    assert report.exchange.bytes_full == sum(recount for *_, recount in results)
    # Three of eight steps are full; at home these return every branch, where the exact path returns sums.
    assert 0 < report.exchange.bytes_sent < (0.5 if location == "owner" else 0.7) * report.exchange.bytes_full


def test_policies_of_whole_modules_estimate_them_from_full_steps(two_ranks, model) -> None:
    exact = two_ranks.run(generate, make_config(model, {}))[0][1].exchange
    results = two_ranks.run(generate, make_config(model, {"policy": "fora", "full_steps": [0, 4]}))
    exchange = results[0][1].exchange
    assert exchange.location is None
    # All of the routing seen was sent, in two of eight steps.
    assert exchange.bytes_full == sum(recount for *_, recount in results) * 4 == exchange.bytes_sent * 4
    assert exchange.bytes_full == pytest.approx(exact.bytes_full, rel=0.05)


def test_a_location_without_branches_is_refused() -> None:
    for policy in ("none", "fora", "taylorseer", "teacache"):
        with pytest.raises(UserError, match=rf"cache.location has no effect with cache.policy {policy}"):
            build_policy(CacheConfig(policy=policy, location="owner"), NUM_STEPS, guided=True)
    for policy in BRANCH_POLICIES:
        assert build_policy(CacheConfig(policy=policy, location="owner"), NUM_STEPS, guided=True) is not None


def test_a_resolved_configuration_can_be_run_again(model, tmp_path: Path) -> None:
    for policy in ("none", "fora", "moeca_forecast"):
        resolved = Engine.from_config(make_config(model, {"policy": policy})).config
        Engine.from_config(Config.model_validate(resolved.model_dump()))


def chosen(policy: str, k: int, ep_size: int, location: str | None = "auto") -> str | None:
    config = CacheConfig.model_validate({"policy": policy, "location": location})
    built = build_policy(config.model_copy(update={"location": None}), 50, guided=True)
    return choose_location(config, built, k, ep_size)


@pytest.mark.parametrize(
    ("k", "ep_size", "home_mib", "owner_mib"),
    [(2, 2, 32.2, 29.8), (5, 2, 225, 173), (5, 4, 375, 386)],
    ids=["demo on 2 ranks", "E48 on 2 ranks", "E48 on 4 ranks"],
)
def test_auto_takes_the_side_that_was_measured_to_send_less(
    k: int, ep_size: int, home_mib: float, owner_mib: float
) -> None:
    """The figures of docs/scaling.md."""
    assert chosen("moeca_forecast", k, ep_size) == ("owner" if owner_mib < home_mib else "home")


def test_auto_keeps_values_at_home_where_owners_save_nothing() -> None:
    assert chosen("moeca_forecast", 2, 1) is None and chosen("fora", 2, 2) is None and chosen("none", 2, 2) is None
    # One branch per owner: nothing to sum. The score of moeca reads stored branches.
    assert chosen("moeca_forecast", 1, 2) == "home" and chosen("moeca_forecast", 2, 32) == "home"
    assert chosen("moeca", 8, 2) == "home"
    assert chosen("moeca_forecast", 2, 32, location="owner") == "owner"
    assert chosen("moeca_forecast", 8, 2, location="home") == "home"
    assert chosen("moeca_forecast", 8, 2, location=None) == "home"

"""The contract of every policy with values at both locations on 1, 2 and 4 ranks: exactness, honest counts.

Shape suffixes: B images of the network's batch, T tokens, N branches, D hidden size, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeca_dist import Engine, Report, Request
from moeca_dist.cache.policies import POLICIES
from moeca_dist.cache.policies.base import Scheduled
from moeca_dist.cache.policy import BranchPolicy, LayerView
from moeca_dist.cache.schedule import FullSteps
from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.config import CacheConfig, Config, HalvesConfig
from moeca_dist.parallel.collectives import Handle
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.types import StepContext
from tests.cache.test_contract import NUM_STEPS, count_products, load, open_session, requests
from tests.helpers.golden_files import load_golden

CASES = [(policy, "home") for policy in POLICIES] + [(p, "owner") for p in ("moeca_forecast", "random", "dice_skip")]
EP_SIZES = pytest.mark.parametrize("ep_size", [1, 2, 4], ids=lambda size: f"EP{size}")


@dataclass
class Recount:
    """What one rank did, counted apart from the program's own counters."""

    flops: list[int] = field(default_factory=list)
    bytes_sent: int = 0
    collectives: int = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    golden = load_golden("dsmoe_e12")
    path = golden.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dsmoe_e12.safetensors")
    return {"checkpoint": str(path), "device": "cpu", **golden.options}


def make_config(model: dict[str, Any], policy: str, location: str, full_steps: Sequence[int]) -> Config:
    every = len(full_steps) == NUM_STEPS
    cache: dict[str, Any] = {"policy": policy, "full_steps": list(full_steps)}
    if policy == "teacache":
        cache = {"policy": policy, "delta": 0.0 if every else 0.008}
    if location == "owner":
        cache["location"] = location
    return Config.model_validate(
        {"model": model, "cache": cache, "sampling": {"num_steps": NUM_STEPS, "batch_size": 2}}
    )


def generate(config: Config, with_exact: bool) -> tuple[NDArray[Any], NDArray[Any] | None, Report, Recount]:
    """On every rank: images with the cache, if asked those without it, and the counts of the cached run."""
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    engine = Engine.from_config(config, mesh=mesh)
    wanted = [Request(index, index % 10, seed=7) for index in range(5)]
    exact = engine.without_cache().generate(wanted)[0] if with_exact else None
    recount = Recount()
    with pytest.MonkeyPatch.context() as patch:
        recount.flops = count_products(engine.model, patch)
        if mesh.expert_group is not None:
            watch_collectives(mesh.expert_group, recount, patch)
        images, report = engine.generate(wanted)
    return images, exact, report, recount


def watch_collectives(group: Any, recount: Recount, patch: pytest.MonkeyPatch) -> None:
    send = group.all_to_all_async

    def counted(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Handle[Tensor]:
        assert rows.shape[0] == sum(sent)
        away = [part for rank, part in enumerate(rows.split(list(sent))) if rank != group.rank]
        recount.bytes_sent += sum(part.numel() * part.element_size() for part in away)
        recount.collectives += 1

        def checked(arrived: Tensor) -> Tensor:
            assert arrived.shape[0] == sum(received)
            return arrived

        return send(rows, sent, received).then(checked)

    patch.setattr(group, "all_to_all_async", counted)


def on_ranks(request: pytest.FixtureRequest, ep_size: int, config: Config, with_exact: bool) -> list[Any]:
    if ep_size == 1:
        return [generate(config, with_exact)]
    return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ep_size]).run(generate, config, with_exact)


@EP_SIZES
@pytest.mark.parametrize(("policy", "location"), CASES)
def test_zero_reuse_is_the_exact_path(request, model, policy: str, location: str, ep_size: int) -> None:
    """Bit for bit at home; owners sum up a token's branches in another order, so there to rounding."""
    config = make_config(model, policy, location, range(NUM_STEPS))
    images, exact, report, _ = on_ranks(request, ep_size, config, True)[0]
    assert report.branches.reuse_ratio == 0 and report.flops.speedup == pytest.approx(1.0, abs=0.01)
    if location == "home" or ep_size == 1:
        assert np.array_equal(images, exact)
    else:
        assert np.linalg.norm(images - exact) <= 1e-5 * np.linalg.norm(exact)


@EP_SIZES
@pytest.mark.parametrize(("policy", "location"), CASES)
def test_reported_work_is_what_hooks_count(request, model, policy: str, location: str, ep_size: int) -> None:
    """FLOP on all ranks together, bytes and collectives of the payload, and collectives that were not needed."""
    results = on_ranks(request, ep_size, make_config(model, policy, location, [0, 1, 4]), False)
    report, recounts = results[0][2], [recount for *_, recount in results]
    assert report.flops.computed == sum(sum(recount.flops) for recount in recounts)
    assert report.exchange.bytes_sent == sum(recount.bytes_sent for recount in recounts)
    assert {recount.collectives for recount in recounts} == {report.exchange.collectives}
    assert report.branches.reuse_ratio > 0
    if ep_size == 1:
        assert report.exchange.collectives == 0
    elif policy not in ("fora", "taylorseer", "toca", "teacache", "network_forecast"):
        rounds, layers = -(-5 // (2 * ep_size)), 2
        assert report.exchange.collectives + report.exchange.collectives_skipped == 2 * rounds * layers * NUM_STEPS


# ---- in one layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Masked(Scheduled, BranchPolicy):
    """Refreshes what it is told, and what is unmatched."""

    refresh_N: Tensor

    name = "masked"

    def refresh(self, step: StepContext, view: LayerView) -> Tensor:
        return self.refresh_N


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["dsmoe_e8", "dsmoe_e12", "dit_moe_flash"])
def test_masked_compute_is_full_compute_on_those_branches(name: str, ratio: float, tmp_path: Path) -> None:
    """Against a loop over tokens: fresh experts where refreshed, experts on the older input where served."""
    network = load(name, tmp_path)
    block, layer = next(network.moe_layers())
    spec, draw = network.spec, torch.Generator().manual_seed(3)
    tokens = 2 * spec.num_tokens
    policy = Masked(
        schedule=FullSteps(frozenset({0}), frozenset({0})),
        refresh_N=torch.rand(tokens * spec.num_experts_per_tok, generator=draw) < ratio,
    )
    session = CacheSession(
        policy, requests(2), guided=False, num_blocks=spec.depth, num_experts=spec.num_experts,
        statistics=CacheStatistics(),
    )  # fmt: skip
    x0 = torch.randn(2, spec.num_tokens, spec.hidden_size, generator=draw)
    x1 = x0 + 0.3 * torch.randn(x0.shape, generator=draw)
    with torch.no_grad():
        for index, x_BTD in enumerate((x0, x1)):
            (part,) = session.at(StepContext(index, 2, index / 2))
            cache = part.block(block)
            found_TD = layer.cached(x_BTD, layer.plan(x_BTD, cache), cache).flatten(0, 1)
        before, now = layer.gate(x0.flatten(0, 1)), layer.gate(x1.flatten(0, 1))
        expected_TD = layer._shared(x0).flatten(0, 1).clone()
        stored = set(zip(before.token_N.tolist(), before.expert_N.tolist(), strict=True))
        changed = 0
        for branch, (token, expert) in enumerate(zip(now.token_N.tolist(), now.expert_N.tolist(), strict=True)):
            fresh = bool(policy.refresh_N[branch]) or (token, expert) not in stored
            changed += (token, expert) not in stored
            x_D = (x1 if fresh else x0).flatten(0, 1)[token]
            expected_TD[token] += now.gate_N[branch] * expert_output(layer.experts, expert, x_D)
    assert changed, "the routing should change for some tokens"
    torch.testing.assert_close(found_TD, expected_TD, atol=1e-5, rtol=1e-4)


def expert_output(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    hidden = torch.nn.functional.silu(experts.w1[expert] @ x_D) * (experts.w3[expert] @ x_D)
    return experts.w2[expert] @ hidden


# ---- nothing is shared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "teacache"])
def test_one_half_never_sees_the_other(policy: str, tmp_path: Path) -> None:
    """On given inputs the conditional outputs are the same whatever the unconditional half stores, and when."""
    network = load("dsmoe_e8", tmp_path)
    conditional = [0, 1, 4]

    def run(unconditional: list[int], null_label: int) -> list[Tensor]:
        halves = HalvesConfig(conditional=conditional, unconditional=unconditional)
        session = open_session(network, CacheConfig(policy=policy, full_steps=halves), requests(2))
        draw, labels_B = torch.Generator().manual_seed(1), torch.tensor([1, 2, null_label, null_label])
        outputs = []
        for index in range(NUM_STEPS):
            shape = (2, network.spec.in_channels, network.spec.input_size, network.spec.input_size)
            x = torch.randn(shape, generator=draw).repeat(2, 1, 1, 1)
            time = index / NUM_STEPS
            with torch.no_grad():
                step = session.at(StepContext(index, NUM_STEPS, time))
                outputs.append(network(x, torch.full((4,), time), labels_B, step))
        return outputs

    def halves(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        together = torch.stack(outputs)
        return together[:, :2], together[:, 2:]

    mine, theirs = halves(run(conditional, 5))
    for other in (run([0, 3, 6], 5), run(conditional, 9)):
        found, changed = halves(other)
        torch.testing.assert_close(found, mine, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(changed, theirs, atol=1e-3)


@pytest.mark.parametrize("location", ["home", "owner"])
@pytest.mark.parametrize("policy", ["moeca_forecast", "random", "dice_skip"])
def test_no_image_depends_on_its_batch_on_ranks(two_ranks, model, policy: str, location: str) -> None:
    """Five images in batches of two per rank, or all together: at least 60 dB apart."""
    config = make_config(model, policy, location, [0, 1, 4])
    together = config.model_copy(update={"sampling": config.sampling.model_copy(update={"batch_size": 8})})
    small, large = (two_ranks.run(generate, each, False)[0][0] for each in (config, together))
    error = np.mean((small - large) ** 2)
    assert 10 * np.log10(np.ptp(small) ** 2 / max(error, 1e-30)) >= 60

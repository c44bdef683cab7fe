"""The branch cache under diffusers' HiDream-I1 transformer; its own forward is the reference.

Shape suffixes: B images, C channels, H and W pixels, T tokens.
"""

from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn

from benchmarks.quality.adapter import (
    NUM_IMAGES,
    NUM_STEPS,
    TEXT,
    TOP_K,
    cached,
    exact,
    relative,
    sample,
    small_hidream,
)
from moeca_dist import Request, UserError
from moeca_dist.adapters.adapter import Adapter, branch_counts
from moeca_dist.adapters.hidream import adapt_hidream
from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

LAYERS = 4
# Image tokens in the two double-stream blocks; in the single-stream ones also T5's and twice Llama's.
TOKENS_PER_IMAGE = 2 * 64 + 2 * (64 + 3 * TEXT)


@pytest.fixture(scope="module")
def model() -> HiDreamImageTransformer2DModel:
    return small_hidream()


@pytest.fixture
def adapter(model: HiDreamImageTransformer2DModel) -> Any:
    adapter = adapt_hidream(model)
    yield adapter
    adapter.remove()


def test_without_a_cached_step_nothing_changes(model: HiDreamImageTransformer2DModel) -> None:
    expected, names = sample(model, exact), list(model.state_dict())
    adapter = adapt_hidream(model)
    assert len(adapter.parts) == LAYERS
    assert torch.equal(sample(model, exact), expected)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in set(model.parameters()))
    adapter.remove()
    assert list(model.state_dict()) == names and torch.equal(sample(model, exact), expected)


@pytest.mark.parametrize("policy", ["moeca_forecast", "random", "fora", "taylorseer"])
def test_a_cache_that_never_reuses_is_identical(adapter: Adapter, policy: str) -> None:
    options = {"ratio": 0.5} if policy == "random" else {}
    found, session = cached(adapter, policy=policy, interval=1, **options)
    assert torch.equal(found, sample(adapter.model, exact))
    if policy in ("moeca_forecast", "random"):
        routed = NUM_STEPS * 2 * NUM_IMAGES * TOKENS_PER_IMAGE * TOP_K
        counts = branch_counts(session.statistics)
        assert counts == {"routed": routed, "refreshed": routed, "unmatched": 0, "served": 0}


def test_a_cached_run_is_near_and_says_what_it_served(adapter: Adapter) -> None:
    expected = sample(adapter.model, exact)
    found, session = cached(adapter, policy="moeca_forecast", interval=2)
    assert 0 < relative(found, expected) < 0.05
    counts = branch_counts(session.statistics)
    assert counts["routed"] == NUM_STEPS * 2 * NUM_IMAGES * TOKENS_PER_IMAGE * TOP_K
    assert counts["refreshed"] + counts["served"] == counts["routed"]
    assert 0.3 < counts["served"] / counts["routed"] < 0.5
    session.note_peak()
    assert session.statistics.bytes_peak > 0
    assert set(session.statistics.branches) == set(range(LAYERS))


def test_more_full_steps_are_nearer(adapter: Adapter) -> None:
    expected = sample(adapter.model, exact)
    errors = [relative(cached(adapter, policy="moeca_forecast", interval=n)[0], expected) for n in (2, 4, 8)]
    assert errors == sorted(errors)


def test_skipped_branches_are_not_computed(adapter: Adapter) -> None:
    """The experts see exactly the refreshed rows."""
    seen = 0
    for parts in adapter.parts.values():

        def count(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal seen
            seen += arguments[0].shape[0]

        parts.experts.register_forward_pre_hook(count)
    _, session = cached(adapter, policy="moeca_forecast", interval=4)
    counts = branch_counts(session.statistics)
    assert seen == counts["refreshed"] < counts["routed"]


def test_a_failure_inside_a_step_leaves_the_model_uncached(adapter: Adapter) -> None:
    expected = sample(adapter.model, exact)
    policy = build_policy(CacheConfig(policy="fora", interval=2), NUM_STEPS, guided=False)
    assert policy is not None
    session = adapter.session(policy, [Request(0, 0)], guided=False)
    with pytest.raises(KeyError), adapter.at(session.at(StepContext(0, NUM_STEPS, 1.0))):
        raise KeyError
    assert torch.equal(sample(adapter.model, exact), expected)


def test_what_an_adapter_cannot_do_is_refused(adapter: Adapter) -> None:
    with pytest.raises(UserError, match="Linear has no MoE layer: nothing to cache"):
        adapt_hidream(nn.Linear(2, 2))
    for options in ({"policy": "teacache", "delta": 0.1}, {"policy": "toca"}):
        policy = build_policy(CacheConfig(**options), NUM_STEPS, guided=True)
        assert policy is not None
        with pytest.raises(UserError, match="which an adapter does not cache: choose a policy of"):
            adapter.session(policy, [Request(0, 0)], guided=True)

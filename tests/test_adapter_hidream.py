"""The branch cache under diffusers' HiDream-I1 transformer; its own forward is the reference.

Shape suffixes: B images, C channels, H and W pixels, T tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn

from moeca_dist import Request, UserError
from moeca_dist.adapters.adapter import Adapter, branch_counts
from moeca_dist.adapters.hidream import adapt_hidream
from moeca_dist.cache.policies import build_policy
from moeca_dist.cache.session import CacheSession
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

NUM_STEPS, NUM_IMAGES, TEXT = 8, 2, 8
LAYERS, TOP_K = 4, 2
# Image tokens in the two double-stream blocks; in the single-stream ones also T5's and twice Llama's.
TOKENS_PER_IMAGE = 2 * 64 + 2 * (64 + 3 * TEXT)


@pytest.fixture(scope="module")
def model() -> HiDreamImageTransformer2DModel:
    torch.manual_seed(0)
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=[32, 32],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=TOP_K,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1, 1],
    ).eval()


@pytest.fixture
def adapter(model: HiDreamImageTransformer2DModel) -> Any:
    adapter = adapt_hidream(model)
    yield adapter
    adapter.remove()


def sample(model: nn.Module, call: Callable[[int, Callable[[], Tensor]], Tensor]) -> Tensor:
    """A few Euler steps of two images in two guidance halves; ``call(step, evaluate)`` makes each evaluation."""
    generator = torch.Generator().manual_seed(1)
    batch = 2 * NUM_IMAGES
    x_BCHW = torch.randn(NUM_IMAGES, 4, 16, 16, generator=generator)
    text = {
        "encoder_hidden_states_t5": torch.randn(batch, TEXT, 32, generator=generator),
        "encoder_hidden_states_llama3": torch.randn(2, batch, TEXT, 32, generator=generator),
        "pooled_embeds": torch.randn(batch, 32, generator=generator),
    }
    for step in range(NUM_STEPS):
        time = torch.full((batch,), 1000.0 * (1 - step / NUM_STEPS))

        def evaluate(x_BCHW: Tensor = x_BCHW, time: Tensor = time) -> Tensor:
            with torch.no_grad():
                return model(x_BCHW.repeat(2, 1, 1, 1), timesteps=time, return_dict=False, **text)[0]

        conditional, unconditional = call(step, evaluate).chunk(2)
        x_BCHW = x_BCHW - (unconditional + 2 * (conditional - unconditional)) / NUM_STEPS
    return x_BCHW


def exact(_step: int, evaluate: Callable[[], Tensor]) -> Tensor:
    return evaluate()


def cached(adapter: Adapter, **options: Any) -> tuple[Tensor, CacheSession]:
    policy = build_policy(CacheConfig(**options), NUM_STEPS, guided=True)
    assert policy is not None
    session = adapter.session(policy, [Request(index, 0) for index in range(NUM_IMAGES)], guided=True)

    def call(step: int, evaluate: Callable[[], Tensor]) -> Tensor:
        with adapter.at(session.at(StepContext(step, NUM_STEPS, 1 - step / NUM_STEPS))):
            return evaluate()

    return sample(adapter.model, call), session


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


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

"""The branch cache under diffusers' HiDream-I1 transformer: what policies compute, and how far their results are off.

    python -m benchmarks.quality.adapter

A small network with random weights, two images in a few Euler steps with guidance; the model's own forward is the
reference. It shows that the adapter works, not what a cache does to pictures. Prints a table. Needs ``[hidream]``.

Shape suffixes: B images, C channels, H and W pixels.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn

from moeca_dist import Request
from moeca_dist.adapters.adapter import Adapter, branch_counts
from moeca_dist.adapters.hidream import adapt_hidream
from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.cache.session import CacheSession
from moeca_dist.config import CacheConfig
from moeca_dist.types import StepContext

NUM_STEPS, NUM_IMAGES, TEXT = 8, 2, 8
TOP_K = 2
GUIDANCE = 2
POLICIES: tuple[Mapping[str, Any], ...] = (
    {"policy": "moeca_forecast", "interval": 2},
    {"policy": "moeca_forecast", "interval": 4},
    {"policy": "random", "ratio": 0.25, "interval": 4},
    {"policy": "taylorseer", "interval": 4},
    {"policy": "fora", "interval": 4},
)

Call = Callable[[int, Callable[[], Tensor]], Tensor]
"""Makes the evaluation of a step."""


def small_hidream() -> HiDreamImageTransformer2DModel:
    """Two double-stream and two single-stream blocks of four experts each."""
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


def sample(model: nn.Module, call: Call) -> Tensor:
    """x_BCHW after a few Euler steps of ``NUM_IMAGES`` images in two guidance halves."""
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
                output: Tensor = model(x_BCHW.repeat(2, 1, 1, 1), timesteps=time, return_dict=False, **text)[0]
                return output

        conditional, unconditional = call(step, evaluate).chunk(2)
        x_BCHW = x_BCHW - (unconditional + GUIDANCE * (conditional - unconditional)) / NUM_STEPS
    return x_BCHW


def exact(_step: int, evaluate: Callable[[], Tensor]) -> Tensor:
    return evaluate()


def cached(adapter: Adapter, **options: Any) -> tuple[Tensor, CacheSession]:
    """x_BCHW with the ``cache:`` section ``options``, and the session with its statistics."""
    policy = build_policy(CacheConfig(**options), NUM_STEPS, guided=True)
    assert policy is not None
    session = adapter.session(policy, [Request(index, 0) for index in range(NUM_IMAGES)], guided=True)

    def call(step: int, evaluate: Callable[[], Tensor]) -> Tensor:
        with adapter.at(session.at(StepContext(step, NUM_STEPS, 1 - step / NUM_STEPS))):
            return evaluate()

    return sample(adapter.model, call), session


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = small_hidream()
    expected = sample(model, exact)
    adapter = adapt_hidream(model)
    print("| policy | full steps | branches computed | relative L2 |\n|---|---|---|---|")
    for options in POLICIES:
        found, session = cached(adapter, **options)
        counts = branch_counts(session.statistics)
        share = f"{counts['refreshed'] / counts['routed']:.1%}" if counts["routed"] else "modules"
        name = f"`{options['policy']}`" + (f", {options['ratio']:.0%}" if "ratio" in options else "")
        print(f"| {name} | every {options['interval']} | {share} | {relative(found, expected):.4f} |")


if __name__ == "__main__":
    main()

"""The shipped model gives the same images however its experts and images are spread over ranks.

Compared before rounding to grey levels: relative L2 of the float samples.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeca_dist import load_model
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.sampling.guidance import exact
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request

CHECKPOINT = Path(__file__).parents[2] / "moeca_dist" / "demo" / "digits.safetensors"
NUM_IMAGES = 7
TOLERANCE = 1e-5


def sample(ep_size: int) -> dict[int, Tensor]:
    """This rank's images of seven, by index; some ranks have fewer than others, and of three images one has none."""
    env = LauncherEnv.read()
    mesh = Mesh.create(env, ep_size=ep_size, device_type="cpu", timeout_s=120)
    model = load_model(CHECKPOINT, mesh=mesh)
    mine = [Request(index, index % 10, seed=1) for index in range(NUM_IMAGES) if index % env.world_size == env.rank]
    samples = sampler_for(model.spec).sample(exact(model), mine, cfg_scale=1.5, num_steps=50)
    return {request.index: image for request, image in zip(mine, samples, strict=True)}


@pytest.fixture(scope="module")
def alone() -> Tensor:
    return assemble([sample(1)])


def assemble(shares: list[dict[int, Tensor]]) -> Tensor:
    images = {index: image for share in shares for index, image in share.items()}
    return torch.stack([images[index] for index in range(NUM_IMAGES)])


@pytest.mark.parametrize("world", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "DP2xEP2"])
def test_same_images(request: pytest.FixtureRequest, alone: Tensor, world: tuple[int, int]) -> None:
    num_ranks, ep_size = world
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    spread = assemble(pool.run(sample, ep_size))
    assert ((spread - alone).norm() / alone.norm()).item() <= TOLERANCE

"""The official implementations' golden values, through the public loader from the original key layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeca_dist import load_model
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from tests.helpers.golden_files import FORWARD_TOLERANCE, GOLDEN_NAMES, load_golden


@pytest.fixture(params=GOLDEN_NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Path:
    return load_golden(name).write_checkpoint(tmp_path / f"{name}.pt")


def run_golden(name: str, path: Path) -> dict[str, Tensor]:
    """Forward and first MoE layer on every rank of the world, experts sharded over all of them."""
    golden = load_golden(name)
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu", timeout_s=60)
    model = load_model(path, mesh=mesh, **golden.options)
    block, layer = next(model.moe_layers())
    assert block == golden.first_moe_block
    routing = layer.gate(golden["moe_in"].flatten(0, 1))
    return {
        "output": model(golden["x"], golden["t"], golden["y"]),
        "moe_out": layer(golden["moe_in"]),
        "expert_ids": routing.expert_N.view(routing.num_tokens, -1),
        "gates": routing.gate_N.view(routing.num_tokens, -1),
        "num_local": torch.tensor(len(layer.local_expert_ids)),
    }


def check_against_golden(found: dict[str, Tensor], name: str) -> None:
    golden, tolerance = load_golden(name), FORWARD_TOLERANCE[name]
    torch.testing.assert_close(found["output"], golden["output"], atol=tolerance, rtol=0)
    torch.testing.assert_close(found["moe_out"], golden["moe_out"], atol=1e-5, rtol=0)
    # Slot order means nothing: compare the chosen experts as sets, each with its weight.
    ours, theirs = found["expert_ids"].sort(-1), golden["moe_expert_ids"].sort(-1)
    assert torch.equal(ours.values, theirs.values)
    weights = golden["moe_weights"].gather(-1, theirs.indices)
    torch.testing.assert_close(found["gates"].gather(-1, ours.indices), weights, atol=1e-5, rtol=0)


def test_single_device(name: str, checkpoint: Path) -> None:
    check_against_golden(run_golden(name, checkpoint), name)


def test_two_expert_parallel_ranks(name: str, checkpoint: Path, two_ranks) -> None:
    for found in two_ranks.run(run_golden, name, checkpoint):
        check_against_golden(found, name)
        assert int(found["num_local"]) == load_golden(name).state_dict[_router_key(name)].shape[0] // 2


def _router_key(name: str) -> str:
    golden = load_golden(name)
    return f"blocks.{golden.first_moe_block}.{'mlp' if golden.is_dsmoe else 'moe'}.gate.weight"

"""Random weights for speed measurements do not depend on how the experts are sharded."""

import torch

from moeca_dist.checkpoints.from_config import load_weights
from moeca_dist.config import ModelConfig
from moeca_dist.parallel.mesh import Mesh

SMALLEST = ModelConfig(name="DSMoE-S-E48", random_init=True, dtype="bfloat16")
CPU = torch.device("cpu")


def test_a_rank_holds_its_share_of_the_same_network() -> None:
    whole = load_weights(SMALLEST, Mesh.single(CPU))
    share = load_weights(SMALLEST, Mesh(1, 2, 2, CPU, None, None, None))
    for (_, all_experts), (_, own) in zip(whole.moe_layers(), share.moe_layers(), strict=True):
        assert own.local_expert_ids == tuple(range(24, 48))
        assert torch.equal(own.experts.w2, all_experts.experts.w2[24:])
    dense = [name for name in whole.state_dict() if ".experts.w" not in name]
    assert all(torch.equal(whole.state_dict()[name], share.state_dict()[name]) for name in dense)
    assert whole.final_layer.linear.weight.dtype == torch.bfloat16
    assert next(whole.moe_layers())[1].gate.weight.dtype == torch.float32

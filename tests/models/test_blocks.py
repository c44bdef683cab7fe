"""Every block, and whole networks, against the naive reference: fp32 modules, float64 loops, 1e-5 apart at most.

Shape suffixes: B images, T tokens of one image, D hidden size, C channels, H height, W width.
"""

from dataclasses import replace

import pytest
import torch

from moeca_dist.models.attention import NormedSelfAttention, SelfAttention, rotary_table
from moeca_dist.models.blocks import (
    DenseMLP,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    timestep_features,
    unpatchify,
)
from moeca_dist.models.dit_moe import sincos_positions
from moeca_dist.models.registry import build_model, published_spec
from moeca_dist.moe.experts import RoutedExperts, SwiGLU
from moeca_dist.moe.layer import MoELayer
from moeca_dist.moe.router import SigmoidRouter, SoftmaxRouter
from tests.reference import naive_models as naive

TOLERANCE = 1e-5
EXPERT_PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}

DSMOE = replace(
    published_spec("DSMoE-S-E16"),
    depth=4,
    hidden_size=24,
    num_heads=3,
    num_experts=6,
    num_experts_per_tok=2,
    expert_width=20,
    shared_width=20,
    moe_blocks=(1, 3),
    input_size=8,
    in_channels=3,
    out_channels=6,
    num_classes=5,
    n_group=3,
    topk_group=2,
    dense_width=96,
)
DIT_MOE = replace(
    published_spec("DiT-MoE-S-8E2A"),
    depth=2,
    hidden_size=24,
    num_heads=3,
    num_experts=5,
    expert_width=16,
    shared_width=8,
    moe_blocks=(0, 1),
    input_size=8,
    num_classes=5,
)
SPECS = {"dsmoe": DSMOE, "dit_moe": DIT_MOE, "dit_moe_normed": replace(DIT_MOE, qk_norm=True)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0, spread=0.2):
    """All parameters and buffers random, so that nothing agrees by being zero or one; results are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.normal_(0, spread, generator=generator)
    return module.eval().requires_grad_(False)


def params_of(module, prefix, experts="experts.blocks"):
    """float64 copies under original names: ``prefix.`` is put in front, stacked experts are taken apart."""
    params = {}
    for key, tensor in module.state_dict().items():
        name, _, weight = key.rpartition("experts.")
        if weight not in EXPERT_PROJECTIONS:
            params[f"{prefix}{key}"] = tensor.double()
            continue
        for expert, matrix in enumerate(tensor):
            params[f"{prefix}{name}{experts}.{expert}.{EXPERT_PROJECTIONS[weight]}_proj.weight"] = matrix.double()
    return params


def assert_close(found, expected, atol=TOLERANCE):
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


# ---- the way in and out ---------------------------------------------------------------------------------------------


def test_patch_embed():
    module, x_BCHW = randomised(PatchEmbed(3, 24, 2)), draw(2, 3, 6, 6)
    params = params_of(module, "x_embedder.")
    assert_close(module(x_BCHW), torch.stack([naive.patch_embed(params, x.double(), 2) for x in x_BCHW]))


def test_unpatchify():
    patches_BTP = draw(2, 9, 2 * 2 * 5)
    expected = torch.stack([naive.unpatchify(patches.double(), 2, 5) for patches in patches_BTP])
    assert torch.equal(unpatchify(patches_BTP, 3, 3, 2).double(), expected)
    assert unpatchify(patches_BTP[:0], 3, 3, 2).shape == (0, 5, 6, 6)


def test_timestep_embedding_of_flow_times():
    module = randomised(TimestepEmbedder(24))
    params = params_of(module, "t_embedder.")
    for t in (0.0, 0.004, 0.37, 0.96, 1.0):
        expected = naive.timestep_embedding(params, float(torch.tensor(t)))
        assert_close(module(torch.tensor([t]))[0], expected)


def test_timestep_features_of_ddpm_times():
    times = [0, 1, 250, 999]
    expected = torch.tensor([naive.timestep_waves(t) for t in times], dtype=torch.float64)
    # Angles up to 999 are only good to 6e-5 in fp32, in the published networks as well.
    assert_close(timestep_features(torch.tensor(times)), expected, atol=2e-4)


def test_final_layer():
    module, x_BTD, c_BD = randomised(FinalLayer(24, 2, 6)), draw(2, 4, 24), draw(2, 24, seed=1)
    params = params_of(module, "final_layer.")
    expected = [naive.final_layer(params, x.double(), c.double()) for x, c in zip(x_BTD, c_BD, strict=True)]
    assert_close(module(x_BTD, c_BD), torch.stack(expected))


def test_position_table():
    table_TD = sincos_positions(3, 4, 24)
    for token in range(12):
        expected = naive.sincos_position(row=token // 4, column=token % 4, width=24)
        assert_close(table_TD[token], torch.tensor(expected, dtype=torch.float64))


# ---- attention and dense --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_size", [24, 60])  # head sizes 8 and 20
def test_attention_with_rotary_positions(hidden_size):
    module, x_BTD = randomised(SelfAttention(hidden_size, 3)), draw(2, 9, hidden_size)
    rotary = rotary_table(3, 3, hidden_size // 3, x_BTD.device)
    params = params_of(module, "attn.")
    expected = [naive.attention(params, "attn", x.double(), 3, rope=True) for x in x_BTD]
    assert_close(module(x_BTD, rotary), torch.stack(expected))


def test_attention_without_positions():
    module, x_BTD = randomised(SelfAttention(24, 3)), draw(2, 9, 24)
    params = params_of(module, "attn.")
    expected = [naive.attention(params, "attn", x.double(), 3) for x in x_BTD]
    assert_close(module(x_BTD, None), torch.stack(expected))


def test_attention_with_normed_rounded_queries_and_keys():
    module, x_BTD = randomised(NormedSelfAttention(24, 3)), draw(2, 9, 24)
    # fp32 here: float64 would round some elements to the other fp16 neighbour.
    params = {key: tensor.float() for key, tensor in params_of(module, "attn.").items()}
    expected = torch.stack([naive.attention(params, "attn", x, 3, normed=True) for x in x_BTD])
    assert_close(module(x_BTD, None), expected.double())


def test_dense_mlp():
    module, x_BTD = randomised(DenseMLP(24, 96)), draw(2, 5, 24)
    params = params_of(module, "mlp.")
    expected = [[naive.dense_mlp(params, "mlp", x_D.double()) for x_D in x_TD] for x_TD in x_BTD]
    assert_close(module(x_BTD), torch.stack([torch.stack(rows) for rows in expected]))


# ---- MoE layers -----------------------------------------------------------------------------------------------------


def moe_layer(router, num_experts, width, shared_width):
    shared = SwiGLU(24, shared_width) if shared_width else None
    return randomised(MoELayer(router, RoutedExperts(24, width, num_experts), shared, num_experts))


def sigmoid_layer(k=2, shared_width=20, groups=(3, 2)):
    return moe_layer(SigmoidRouter(24, 6, k, *groups, 2.5), 6, 20, shared_width)


def softmax_layer(k=2, shared_width=12):
    return moe_layer(SoftmaxRouter(24, 6, k), 6, 20, shared_width)


def naive_layer(layer, x_TD):
    params = params_of(layer, "moe.")
    gate = layer.gate

    def route(x_D):
        if isinstance(gate, SoftmaxRouter):
            return naive.dit_moe_route(x_D, params["moe.gate.weight"], k=gate.num_experts_per_tok)
        return naive.dsmoe_route(
            x_D,
            params["moe.gate.weight"],
            params["moe.gate.e_score_correction_bias"],
            k=gate.num_experts_per_tok,
            n_group=gate.n_group,
            topk_group=gate.topk_group,
            scale=gate.routed_scaling_factor,
        )

    return naive.moe_layer(params, "moe", "moe.experts.blocks", x_TD.double(), route)


@pytest.mark.parametrize("make", [sigmoid_layer, softmax_layer])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("shared_width", [0, 12])
def test_moe_layer(make, k, shared_width):
    options = {"groups": (1, 1)} if make is sigmoid_layer and k == 6 else {}
    layer, x_BTD = make(k, shared_width, **options), draw(2, 7, 24)
    assert_close(layer(x_BTD).flatten(0, 1), naive_layer(layer, x_BTD.flatten(0, 1)))


@pytest.mark.parametrize("make", [sigmoid_layer, softmax_layer])
def test_moe_layer_where_one_expert_takes_every_token_and_one_none(make):
    layer, x_BTD = make(), draw(1, 9, 24)
    x_BTD[..., 0] = 1.0  # a constant input, so that one weight can settle an expert's fate
    layer.gate.weight[4, 0], layer.gate.weight[1, 0] = 40.0, -40.0
    if isinstance(layer.gate, SigmoidRouter):
        # A dropped group counts as zero, so an expert is only sure to stay idle below all others.
        layer.gate.e_score_correction_bias.copy_(torch.tensor([0.5, -9.0, 0.6, 0.5, 0.9, 0.7]))
    chosen_TK = layer.gate(x_BTD[0]).expert_N.view(9, -1)
    assert (chosen_TK == 4).any(dim=1).all() and not (chosen_TK == 1).any()
    assert_close(layer(x_BTD)[0], naive_layer(layer, x_BTD[0]))


@pytest.mark.parametrize("make", [sigmoid_layer, softmax_layer])
@pytest.mark.parametrize("shape", [(0, 7, 24), (2, 0, 24)])
def test_moe_layer_without_tokens(make, shape):
    assert make()(torch.empty(shape)).shape == shape


def test_a_single_expert_is_a_dense_feed_forward():
    layer, x_BTD = moe_layer(SoftmaxRouter(24, 1, 1), 1, 20, 12), draw(1, 5, 24)
    params = params_of(layer, "moe.")
    expected = [
        naive.swiglu(params, "moe.experts.blocks.0", x_D) + naive.swiglu(params, "moe.shared_experts", x_D)
        for x_D in x_BTD[0].double()
    ]
    assert_close(layer(x_BTD)[0], torch.stack(expected))


# ---- blocks and whole networks --------------------------------------------------------------------------------------


def naive_network(spec, model):
    """``(x_CHW, t, y) -> output`` of one image, in float64 (fp32 where fp16 rounding would amplify the difference)."""
    params = params_of(model, "", "experts" if spec.family == "dit_moe" else "experts.blocks")
    if spec.qk_norm:
        params = {key: tensor.float() for key, tensor in params.items()}
    dtype = torch.float32 if spec.qk_norm else torch.float64

    def network(x_CHW, t, y):
        if spec.family == "dit_moe":
            return naive.dit_moe_forward(
                params, x_CHW.to(dtype), t, y, num_heads=spec.num_heads, k=spec.num_experts_per_tok
            )
        return naive.dsmoe_forward(
            params,
            x_CHW.to(dtype),
            t,
            y,
            num_heads=spec.num_heads,
            k=spec.num_experts_per_tok,
            n_group=spec.n_group,
            topk_group=spec.topk_group,
            scale=spec.routed_scaling_factor,
        )

    return network


@pytest.mark.parametrize("name", SPECS)
def test_whole_network(name):
    spec = SPECS[name]
    model = randomised(build_model(spec), seed=3, spread=0.12)
    reference = naive_network(spec, model)
    x_BCHW, t_B, y_B = draw(2, spec.in_channels, 8, 8), torch.tensor([0.25, 0.75]), torch.tensor([1, spec.null_label])
    expected = [reference(x, float(t), int(y)) for x, t, y in zip(x_BCHW, t_B, y_B, strict=True)]
    assert_close(model(x_BCHW, t_B, y_B), torch.stack(expected).double())


@pytest.mark.parametrize("name", SPECS)
def test_whole_network_without_images(name):
    spec = SPECS[name]
    model = randomised(build_model(spec), seed=3, spread=0.12)
    output = model(torch.empty(0, spec.in_channels, 8, 8), torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert output.shape == (0, spec.out_channels, 8, 8)

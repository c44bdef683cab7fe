"""The published sizes: parameters, tensors and work as published."""

import pytest

from moeca_dist.errors import UserError
from moeca_dist.models.flops import forward_flops
from moeca_dist.models.registry import FAMILIES, count_parameters, original_shapes, override, published_spec
from moeca_dist.models.spec import ModelSpec, TimeConvention

# name: (total parameters, active parameters, half a unit of the last published digit), in millions
PARAMETERS = {
    "DSMoE-S-E16": (96.87, 34.94, 0.005),
    "DSMoE-S-E48": (69.24, 31.19, 0.005),
    "DSMoE-B-E16": (386.3, 138.6, 0.05),
    "DSMoE-B-E48": (275.6, 123.4, 0.05),
    "DSMoE-L-E16": (1368, 487.3, 0.5),
    "DSMoE-L-E48": (1167, 456.8, 0.5),
    "DSMoE-3B-E16": (3102, 1011, 0.5),
    "DiT-MoE-S-8E2A": (199.3, 71.9, 0.05),
    "DiT-MoE-S-16E2A": (369.2, 71.9, 0.05),
    "DiT-MoE-B-8E2A": (795.9, 286.3, 0.05),
    "DiT-MoE-L-8E2A": (2820, 1010, 5),
    "DiT-MoE-XL-8E2A": (4168, 1493, 0.5),
    "DiT-MoE-G-16E2A": (16504, 3182, 0.5),
}
TENSORS = {
    "DiT-MoE-S-8E2A": 420,
    "DiT-MoE-B-8E2A": 420,
    "DiT-MoE-XL-8E2A": 1076,
    "DiT-MoE-G-16E2A": 2492,
    "DSMoE-S-E16": 356,
    "DSMoE-B-E16": 356,
    "DSMoE-S-E48": 1001,
    "DSMoE-B-E48": 1001,
    "DSMoE-L-E16": 701,
    "DSMoE-L-E48": 1991,
    "DSMoE-3B-E16": 1046,
}
# GFLOP of one forward at 256 tokens, and half a unit of the last published digit
GFLOP = {
    "DSMoE-S-E16": (13.9, 0.05),
    "DSMoE-S-E48": (11.3, 0.05),
    "DSMoE-L-E16": (188, 0.5),
    "DSMoE-L-E48": (160, 5),
    "DiT-MoE-XL-8E2A": (656, 0.5),
    "DiT-MoE-G-16E2A": (1397, 0.5),
}
# Shares of attention, dense blocks, routed and shared experts in percent
SHARES = {
    "DSMoE-S-E16": (29, 22, 33, 16),
    "DSMoE-S-E48": (43, 32, 20, 4),
    "DSMoE-L-E16": (26, 23, 34, 17),
    "DSMoE-L-E48": (36, 32, 26, 5),
    "DiT-MoE-XL-8E2A": (13, 0, 70, 17),
    "DiT-MoE-G-16E2A": (13, 0, 70, 17),
}


def test_every_published_size_is_checked() -> None:
    assert set(PARAMETERS) == {name for family in FAMILIES.values() for name in family.published}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    total, active = count_parameters(published_spec(name))
    published_total, published_active, tolerance = PARAMETERS[name]
    assert total / 1e6 == pytest.approx(published_total, abs=tolerance)
    assert active / 1e6 == pytest.approx(published_active, abs=tolerance)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_counts(name: str) -> None:
    assert len(original_shapes(published_spec(name))) == TENSORS[name]


@pytest.mark.parametrize("name", GFLOP)
def test_work_of_one_forward(name: str) -> None:
    published, tolerance = GFLOP[name]
    assert forward_flops(published_spec(name)).total / 1e9 == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_the_work(name: str) -> None:
    flops = forward_flops(published_spec(name))
    main = flops.attention + flops.dense + flops.routed + flops.shared
    for part, percent in zip(("attention", "dense", "routed", "shared"), SHARES[name], strict=True):
        assert 100 * getattr(flops, part) / main == pytest.approx(percent, abs=1), part


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_file_needs_no_options(name: str) -> None:
    """Family and size are told by keys and shapes alone."""
    spec = published_spec(name)
    shapes = original_shapes(spec)
    family = FAMILIES[spec.family]
    assert [other.name for other in FAMILIES.values() if other.matches(shapes)] == [spec.family]
    assert family.infer(shapes, {}) == spec


def test_spec_round_trip() -> None:
    spec = published_spec("dsmoe-s-e16")
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert spec.time_convention is TimeConvention.FLOW_NOISE_TO_DATA
    with pytest.raises(ValueError, match="unknown model hyper-parameters"):
        ModelSpec.from_dict(spec.to_dict() | {"width": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "not a multiple of num_heads 7"),
        ({"num_experts_per_tok": 17}, r"must lie in 1..num_experts \(16\)"),
        ({"n_group": 3}, "n_group 3 must divide num_experts 16"),
        ({"topk_group": 3}, "topk_group 3 must lie in 1..n_group"),
        ({"n_group": 16, "topk_group": 1}, "cannot serve num_experts_per_tok 2"),
        ({"input_size": 31}, "input_size 31 is not a multiple of patch_size 2"),
    ],
)
def test_contradicting_options(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(published_spec("DSMoE-S-E16"), changes)


def test_unknown_published_name() -> None:
    with pytest.raises(UserError, match="no published model is called 'DSMoE-XL'; known are DSMoE-S-E16"):
        published_spec("DSMoE-XL")

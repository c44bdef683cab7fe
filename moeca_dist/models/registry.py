"""The model families that can be loaded, one entry each.

A new family is one file with its blocks, published sizes and key names. It also needs one entry in ``FAMILIES`` and one
numerics test.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from moeca_dist.errors import UserError
from moeca_dist.models import dit_moe, dsmoe
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.infer_spec import Shapes, dit_moe_spec, dsmoe_spec
from moeca_dist.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """The functions that recognise, size, build and name the parts of one family.

    ``infer(shapes, options)`` raises UserError if shapes cannot tell a hyper-parameter. The error names the option to
    state.
    """

    name: str
    published: Mapping[str, ModelSpec]
    build: Callable[[ModelSpec], DiffusionTransformer]
    matches: Callable[[Iterable[str]], bool]
    infer: Callable[[Shapes, Mapping[str, Any]], ModelSpec]
    experts_prefix: Callable[[int], str]
    expert_key: Callable[[int, int, str], str]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dsmoe": Family(
            "dsmoe", dsmoe.PUBLISHED, dsmoe.DSMoE, dsmoe.matches, dsmoe_spec, dsmoe.experts_prefix, dsmoe.expert_key
        ),
        "dit_moe": Family(
            "dit_moe",
            dit_moe.PUBLISHED,
            dit_moe.DiTMoE,
            dit_moe.matches,
            dit_moe_spec,
            dit_moe.experts_prefix,
            dit_moe.expert_key,
        ),
    }
)


def build_model(spec: ModelSpec) -> DiffusionTransformer:
    """Build the network of ``spec`` on the current default device, with uninitialised parameters."""
    return FAMILIES[spec.family].build(spec)


def published_spec(name: str) -> ModelSpec:
    """Return the spec of a published size such as ``DSMoE-S-E16``.

    Raises UserError with the known names for any other name.
    """
    sizes = {size: spec for family in FAMILIES.values() for size, spec in family.published.items()}
    for size, spec in sizes.items():
        if size.lower() == name.lower():
            return spec
    raise UserError(f"no published model is called {name!r}; known are {', '.join(sizes)}")


def override(spec: ModelSpec, options: Mapping[str, Any]) -> ModelSpec:
    """Return ``spec`` with the stated options in place of the found ones.

    Raises UserError if they contradict each other.
    """
    try:
        return replace(spec, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def original_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return every key of the published file of ``spec`` with its shape. Experts are listed one by one."""
    family = FAMILIES[spec.family]
    with torch.device("meta"):
        state = family.build(spec).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if ".experts.w" not in key}
    up, down = (spec.expert_width, spec.hidden_size), (spec.hidden_size, spec.expert_width)
    for block in spec.moe_blocks:
        for expert in range(spec.num_experts):
            for projection, shape in (("gate", up), ("up", up), ("down", down)):
                shapes[family.expert_key(block, expert, projection)] = shape
    return shapes


def count_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Count the parameters as the publications do, and return (total, active per token).

    Position tables are included, routing biases are not.
    """
    with torch.device("meta"):
        state = build_model(spec).state_dict()
    total = sum(tensor.numel() for key, tensor in state.items() if not key.endswith("e_score_correction_bias"))
    expert = 3 * spec.hidden_size * spec.expert_width
    idle = len(spec.moe_blocks) * (spec.num_experts - spec.num_experts_per_tok) * expert
    return total, total - idle

"""Loading of a checkpoint: infer the model, check all of the file, then materialise what this rank holds.

Everything is checked from names and shapes before a byte of weights is allocated. The model is built on the meta
device, and its experts are sharded there. The weights are then copied tensor by tensor out of the mapped file. So at
most one tensor is held beyond the model itself.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeca_dist.checkpoints.options import LoadOptions
from moeca_dist.checkpoints.tensor_source import TensorSource, open_source
from moeca_dist.errors import UserError
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.parallelize import shard_experts
from moeca_dist.models.registry import FAMILIES, Family, build_model, original_shapes, override
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.router import SigmoidRouter
from moeca_dist.parallel.all_to_all import AllToAllDispatcher
from moeca_dist.parallel.expert_placement import ExpertPlacement, PlacementTable
from moeca_dist.parallel.mesh import Mesh

_STACKED_WEIGHTS = (("w1", "gate"), ("w3", "up"), ("w2", "down"))
_NAMES_SHOWN = 4


def load_model(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    placement: ExpertPlacement | PlacementTable | None = None,
    **options: Any,
) -> DiffusionTransformer:
    """Load a published checkpoint (any wrapping), a ``.safetensors`` file or a sharded folder, ready for inference.

    ``model(x_BCHW, t_B, y_B)`` is the raw network output [B, C_out, H, W]. ``model.spec`` describes the loaded model.

    Args:
        mesh: the mesh of ranks. If its ``ep_size`` is above 1, this rank materialises only its own experts. A mesh
            without an expert group (``Mesh(rank, n, n, device, None, None, None)``) loads a rank's weights without a
            process group. Such a model cannot run.
        placement: the experts of each rank (default: equal runs). A table places the experts of every block on its own.
        options: hyper-parameters that the checkpoint does not tell, or that override it. They are ``family``,
            ``num_heads``, ``num_experts_per_tok``, ``n_group``, ``topk_group``, ``routed_scaling_factor`` and
            ``input_size``. Further options are ``dtype`` and ``device``. ``dtype`` is "float32" (the default),
            "bfloat16", "float16" or a torch.dtype. ``device`` is "auto", "cpu", "cuda" or a torch.device. DSMoE routers
            compute in fp32 and keep their weights in it, for any dtype.

    Raises UserError, in one line, for an unknown option or a file that cannot be read. Raises UserError also for a file
    that is not exactly the model it is taken for.
    """
    settings = LoadOptions.parse(options)
    device = settings.choose_device(None if mesh is None else mesh.device)
    source = open_source(path)
    spec = infer_spec(source, settings.model)
    check_fits(source, spec)
    with torch.device("meta"):
        model = build_model(spec)
    shard_for(model, mesh, placement)
    _materialise(model, source, settings.dtype, device)
    return model.eval().requires_grad_(False)


def infer_spec(source: TensorSource, options: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of the checkpoint: the stated one, else one inferred from names and shapes.

    ``options`` override both.

    Raises UserError for a foreign checkpoint. If shapes cannot tell a hyper-parameter, the error names the option to
    state.
    """
    stated = source.stated_spec
    family = _recognise(source) if stated is None else _stated_family(source, stated)
    if options.get("family", family.name) != family.name:
        raise UserError(f"{source.path} is a {family.name} checkpoint, not {options['family']}: drop option family")
    try:
        if stated is not None:
            return override(ModelSpec.from_dict(dict(stated)), options)
        return family.infer(source.shapes, options)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        # A stated spec with wrong fields, or a tensor without the dimensions that its name promises.
        raise UserError(
            f"{source.path} does not describe a {family.name} network ({error}): get the original file"
        ) from error


def check_fits(source: TensorSource, spec: ModelSpec) -> None:
    """Require exactly the keys of ``spec``'s published layout, each floating point and of the right shape.

    Raises UserError with the first few wrong keys and their number.
    """
    expected = original_shapes(spec)
    missing = [key for key in expected if key not in source.infos]
    unexpected = [key for key in source.infos if key not in expected]
    if missing or unexpected:
        faults = [f"{kind} {_some(keys)}" for kind, keys in (("lacks", missing), ("has unknown", unexpected)) if keys]
        raise UserError(
            f"{source.path} is not a complete {spec.family} checkpoint of depth {spec.depth}: it "
            f"{' and '.join(faults)}; get the original file, or correct the options"
        )
    for key, info in source.infos.items():
        if info.shape != expected[key]:
            raise UserError(
                f"{source.path}: {key} has shape {list(info.shape)}, but this {spec.family} network needs "
                f"{list(expected[key])}: get the original file, or correct the options"
            )
        if not info.dtype.is_floating_point:
            raise UserError(
                f"{source.path}: {key} is stored as {info.dtype}; quantised checkpoints are not supported, "
                "get the original one"
            )


def shard_for(
    model: DiffusionTransformer, mesh: Mesh | None, placement: ExpertPlacement | PlacementTable | None = None
) -> DiffusionTransformer:
    """Keep only the experts of ``mesh``'s rank in a model on the meta device, in place. One rank keeps all of them.

    Raises UserError if ``placement`` is not for this model's experts and this mesh's ranks.
    """
    ep_size = 1 if mesh is None else mesh.ep_size
    blocks, num_experts = model.spec.moe_blocks, model.spec.num_experts
    placement = placement or ExpertPlacement.contiguous(num_experts, ep_size)
    table = placement if isinstance(placement, PlacementTable) else PlacementTable.same(placement, blocks)
    table.check_fits(blocks, num_experts, ep_size)
    if mesh is None or ep_size == 1:
        return model
    group = mesh.expert_group
    return shard_experts(model, table, mesh.ep_rank, None if group is None else partial(AllToAllDispatcher, group))


def full_precision_keys(model: DiffusionTransformer) -> frozenset[str]:
    """Return the keys that stay in fp32 for any dtype of the model.

    Otherwise routers that compute in fp32 would be rounded.
    """
    return frozenset(
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, SigmoidRouter)
        for key in module.state_dict()
    )


def _recognise(source: TensorSource) -> Family:
    if any(key.endswith(".mlp.gate_weight") or ".capacity_predictor." in key for key in source.infos):
        raise UserError(
            f"{source.path} is a DiffMoE checkpoint, whose routing depends on the whole batch: it is not supported; "
            f"use one of {', '.join(FAMILIES)}"
        )
    family = next((family for family in FAMILIES.values() if family.matches(source.infos)), None)
    if family is None:
        raise UserError(
            f"{source.path} holds no known model (families: {', '.join(FAMILIES)}): its tensors are "
            f"{_some(list(source.infos))}; check that this is the right file"
        )
    return family


def _stated_family(source: TensorSource, stated: Any) -> Family:
    name = stated.get("family") if isinstance(stated, Mapping) else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{source.path} states family {name!r}, known are {', '.join(FAMILIES)}: convert it again with this version"
        )
    return FAMILIES[name]


def _materialise(model: DiffusionTransformer, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate every tensor of the model in its final dtype and place, and copy the weights in one by one."""
    family = FAMILIES[model.spec.family]
    experts: dict[str, Sequence[str]] = {}
    for block, layer in model.moe_layers():
        for weight, projection in _STACKED_WEIGHTS:
            keys = [family.expert_key(block, expert, projection) for expert in layer.local_expert_ids]
            experts[f"{family.experts_prefix(block)}.{weight}"] = keys
    full_precision = full_precision_keys(model)
    state: dict[str, Tensor] = {}
    for key, meta in model.state_dict().items():
        tensor = torch.empty(meta.shape, dtype=torch.float32 if key in full_precision else dtype, device=device)
        if key in experts:
            for slot, original in enumerate(experts[key]):
                tensor[slot].copy_(source.get(original))
        else:
            tensor.copy_(source.get(key))
        state[key] = tensor
    model.load_state_dict(state, strict=True, assign=True)


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - _NAMES_SHOWN
    return ", ".join(keys[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")

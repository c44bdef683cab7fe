"""Networks made from the ``model:`` section of a configuration: from a checkpoint, or random for speed measurements."""

from typing import Any

import torch

from moeca_dist.checkpoints.load import check_fits, infer_spec, load_model, shard_for
from moeca_dist.checkpoints.options import MODEL_OPTIONS, parse_dtype
from moeca_dist.checkpoints.random_init import randomise
from moeca_dist.checkpoints.tensor_source import open_source
from moeca_dist.config import ModelConfig
from moeca_dist.errors import UserError
from moeca_dist.kernels.select import kernels_of
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.registry import build_model, override, published_spec
from moeca_dist.models.spec import ModelSpec
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.parallel.mesh import Mesh

_IDENTITY = ("family", "depth", "hidden_size", "num_experts", "expert_width")


def check_weights(config: ModelConfig) -> ModelSpec:
    """Return the spec of the network that ``config`` asks for. Names and shapes tell it, and no weights are read.

    Raises UserError if the checkpoint is missing, foreign, incomplete or not of the size ``config.name``. Raises
    UserError also if the configuration names no weights at all.
    """
    if config.checkpoint is None:
        return _random_spec(config)
    source = open_source(config.checkpoint)
    spec = infer_spec(source, _stated(config))
    check_fits(source, spec)
    if config.name is not None:
        named = published_spec(config.name)
        differing = [name for name in _IDENTITY if getattr(spec, name) != getattr(named, name)]
        if differing:
            found = ", ".join(f"{name} {getattr(spec, name)}" for name in differing)
            wanted = ", ".join(f"{name} {getattr(named, name)}" for name in differing)
            raise UserError(
                f"{config.checkpoint} is not {config.name}: it has {found}, not {wanted}; correct model.name or "
                "model.checkpoint"
            )
    return spec


def load_weights(config: ModelConfig, mesh: Mesh, table: PlacementTable | None = None) -> DiffusionTransformer:
    """Load this rank's part of the network, ready for inference.

    Args:
        table: the expert placement. None stands for equal runs of experts.

    Raises UserError as ``check_weights`` does, and for a table of another network or number of ranks. Raises UserError
    also for kernels that cannot run on the device.
    """
    spec = check_weights(config)
    kernels_of(config.kernels, mesh.device)  # refused before weights are read; the engine puts them to use
    if config.checkpoint is not None:
        return load_model(config.checkpoint, mesh=mesh, placement=table, dtype=config.dtype, **_stated(config))
    with torch.device("meta"):
        model = build_model(spec)
    shard_for(model, mesh, table)
    return randomise(model, mesh.device, parse_dtype(config.dtype))


def _random_spec(config: ModelConfig) -> ModelSpec:
    if not config.random_init or config.name is None:
        raise UserError(
            f"no weights to generate with: set model.checkpoint to the {config.name or 'model'} file (--set "
            "model.checkpoint=PATH), or model.random_init=true and model.name to measure speed only"
        )
    options = {name: value for name, value in _stated(config).items() if name != "family"}
    return override(published_spec(config.name), options)


def _stated(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name in MODEL_OPTIONS if (value := getattr(config, name)) is not None}

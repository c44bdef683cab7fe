"""What can be refused before any work, and what a configuration becomes once model and ranks are known."""

from collections.abc import Sequence

from moeca_dist.cache.policies import build_policy
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.graphs import check_graphs
from moeca_dist.memory import cache_size, check_memory
from moeca_dist.models.loading import check_weights
from moeca_dist.models.spec import ModelSpec
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.parallel.placement_table import PlacementTable
from moeca_dist.sampling.calibration import Calibration, read_calibration
from moeca_dist.sampling.noise import check_stream
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request
from moeca_dist.vae import check_autoencoder


def resolve(config: Config, spec: ModelSpec, world_size: int) -> Config:
    """``config`` with what the model and the number of ranks decide where it leaves it open."""
    num_steps = config.sampling.num_steps or sampler_for(spec).default_num_steps
    sampling = config.sampling.model_copy(update={"num_steps": num_steps})
    parallel = config.parallel.model_copy(update={"ep_size": config.parallel.ep_size or world_size})
    return config.model_copy(update={"sampling": sampling, "parallel": parallel})


def read_placement(config: Config) -> PlacementTable | None:
    """The configured expert placement; UserError for a file that is none. Loading checks that it fits."""
    path = config.parallel.expert_placement
    return None if path is None else PlacementTable.read(path)


def check_config(config: Config, labels: Sequence[int]) -> ModelSpec:
    """Everything about the model and the labels that can be refused without loading weights; cheap.

    Raises UserError for a missing, foreign or inconsistent checkpoint, step counts the sampler does not offer, labels
    that the model does not have, CUDA graphs of what cannot be captured, a calibration or expert placement that is
    none, and a decoder that is not there or has no use.
    """
    spec = check_weights(config.model)
    sampler = sampler_for(spec)
    num_steps = config.sampling.num_steps or sampler.default_num_steps
    sampler.check_num_steps(num_steps)
    build_policy(config.cache, num_steps, guided=config.sampling.cfg_scale != 1)
    check_graphs(config, spec)
    if config.cache.calibration is not None:
        read_calibration(config.cache.calibration)
    read_placement(config)
    check_requests([Request(index, label) for index, label in enumerate(labels)], spec)
    check_decoder(config, spec)
    return spec


def check_cache_fits(
    config: Config, spec: ModelSpec, mesh: Mesh, num_images: int, calibration: Calibration | None = None
) -> None:
    """Raise UserError where this rank's cache of a round would exceed ``cache.memory_limit``; needs no weights.

    ``calibration``: where there is no file of it.
    """
    num_steps = config.sampling.num_steps or sampler_for(spec).default_num_steps
    per_round = min(num_images, mesh.world_size * config.sampling.batch_size)
    most = -(-per_round // mesh.world_size)
    check_memory(cache_size(config, spec, num_steps, mesh.ep_size, calibration), config.cache, most, mesh.device)


def check_requests(requests: Sequence[Request], spec: ModelSpec) -> None:
    """Raise UserError unless every label is one of the model's classes and every noise stream exists."""
    for request in requests:
        check_stream(request.seed, request.index)
        if not 0 <= request.label < spec.num_classes:
            raise UserError(
                f"label {request.label} is out of range: this model has {spec.num_classes} classes, "
                f"0-{spec.num_classes - 1}"
            )


def check_decoder(config: Config, spec: ModelSpec) -> None:
    """Raise UserError for a decoder that is not there, or has no use for the network."""
    if config.sampling.vae is None:
        return
    if not spec.is_latent:
        raise UserError("sampling.vae has no effect: this model generates pixels, not latents; remove it")
    check_autoencoder(config.sampling.vae)

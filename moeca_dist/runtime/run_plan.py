"""A resolved run: what a configuration means for one network and its ranks, decided and validated in one place.

The command line and ``Engine.from_config`` resolve a plan before weights are read, so that mistakes are refused at
once. An engine resolves its own for the network that it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.cache.policy import HALVES, Half, Policy
from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import storage_of
from moeca_dist.calibration.correction import Corrected, OutputMemory
from moeca_dist.calibration.file import Calibration, FittedFor, check_fits, fitted_for, read_calibration
from moeca_dist.checkpoints.from_config import check_weights
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.value_location import Location, choose_location
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.report.figures import RunFigures
from moeca_dist.runtime.cache_memory import CacheSize, check_memory
from moeca_dist.runtime.cuda_graphs import check_graphs
from moeca_dist.sampling.guidance import Guidance
from moeca_dist.sampling.latent_decoder import check_autoencoder
from moeca_dist.sampling.noise import check_stream
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.timing import Timer
from moeca_dist.types import Request


@dataclass(frozen=True)
class RunPlan:
    """The decisions that all runs of an engine have in common.

    ``RunPlan.resolve`` makes them, and a batch adds its requests.

    Attributes:
        config: with the values that the model and the world decided. Running it again is the same run.
        halves: the guidance halves that the network evaluates.
        policy: None without a cache.
        location: which side of the exchange keeps branch values. None if there is no choice.
        placement: which rank owns which expert. None: equal runs of consecutive experts.
        calibration: None if outputs are not corrected.
    """

    config: Config
    spec: ModelSpec
    world_size: int
    halves: tuple[Half, ...]
    policy: Policy | None
    location: Location | None
    placement: PlacementTable | None
    calibration: Calibration | None

    @classmethod
    def resolve(
        cls,
        config: Config,
        world_size: int,
        spec: ModelSpec | None = None,
        calibration: Calibration | None = None,
    ) -> "RunPlan":
        """Decide what the configuration leaves open, without reading weights.

        Raises UserError for what cannot be carried out:

        - a missing, foreign or inconsistent checkpoint,
        - step counts that the sampler does not offer,
        - options without effect,
        - CUDA graphs of steps that follow the data,
        - a file that is no calibration or expert placement,
        - a decoder that is not there or has no use.

        Args:
            spec: of the network, if it is loaded already.
            calibration: of this cache and network, if there is no file of it.
        """
        spec = check_weights(config.model) if spec is None else spec
        sampler = sampler_for(spec)
        num_steps = config.sampling.num_steps or sampler.default_num_steps
        sampler.check_num_steps(num_steps)
        halves = HALVES if config.sampling.cfg_scale != 1 else HALVES[:1]
        policy = build_policy(config.cache, num_steps, guided=len(halves) == 2)
        check_graphs(config, spec)
        ep_size = config.parallel.ep_size or world_size
        location = choose_location(config.cache, policy, spec.num_experts_per_tok, ep_size)
        if calibration is None and config.cache.calibration is not None:
            calibration = read_calibration(config.cache.calibration)
        path = config.parallel.expert_placement
        placement = None if path is None else PlacementTable.read(path)
        _check_decoder(config, spec)
        sampling = config.sampling.model_copy(update={"num_steps": num_steps})
        parallel = config.parallel.model_copy(update={"ep_size": ep_size})
        config = config.model_copy(update={"sampling": sampling, "parallel": parallel})
        return cls(config, spec, world_size, halves, policy, location, placement, calibration)

    @property
    def num_steps(self) -> int:
        assert self.config.sampling.num_steps is not None
        return self.config.sampling.num_steps

    @property
    def ep_size(self) -> int:
        assert self.config.parallel.ep_size is not None
        return self.config.parallel.ep_size

    def check_requests(self, requests: Sequence[Request]) -> None:
        """Raise UserError unless every label is one of the model's classes and every noise stream exists."""
        for request in requests:
            check_stream(request.seed, request.index)
            if not 0 <= request.label < self.spec.num_classes:
                raise UserError(
                    f"label {request.label} is out of range: this model has {self.spec.num_classes} classes, "
                    f"0-{self.spec.num_classes - 1}"
                )

    def check_memory(self, num_images: int, device: torch.device) -> None:
        """Raise UserError if a rank's cache of a round would exceed ``cache.memory_limit``. Weights are not needed."""
        per_round = min(num_images, self.world_size * self.config.sampling.batch_size)
        most = -(-per_round // self.world_size)
        check_memory(self.cache_size(), self.config.cache, most, device)

    def check_calibration(self, model: DiffusionTransformer) -> None:
        """Raise UserError if the calibration was fitted for other weights, another cache or other sampling."""
        if self.calibration is not None:
            check_fits(self.calibration, self.fitted_for(model), self.config.cache.calibration)

    def cache_size(self) -> CacheSize | None:
        """Return what the caches keep, or None without a cache."""
        if self.policy is None:
            return None
        history = None if self.calibration is None else self.calibration.weights.history
        return CacheSize.of_run(
            self.config, self.spec, self.policy, self.halves, self.location, self.placement, output_history=history
        )

    def figures(self, num_images: int, statistics: CacheStatistics) -> RunFigures:
        """Return the figures of a run of so many images, from its statistics."""
        return RunFigures(self.spec, num_images * len(self.halves) * self.num_steps, self.policy, statistics)

    def fitted_for(self, model: DiffusionTransformer) -> FittedFor:
        """Return what calibrated weights of these runs depend on."""
        return fitted_for(self.config, self.num_steps, self.policy, self.halves, model)

    def combine(self) -> Corrected | None:
        """Return what takes the place of guidance in one batch, if a calibration is configured."""
        if self.calibration is None or self.policy is None:
            return None
        weights = self.calibration.weights
        memory = OutputMemory(self.policy.is_full, weights.history)
        return Corrected(Guidance(self.config.sampling.cfg_scale), weights, memory)

    def open_session(
        self, share: Sequence[Request], model: DiffusionTransformer, statistics: CacheStatistics, timer: Timer
    ) -> CacheSession | None:
        """Open the caches of one batch. Returns None without a cache."""
        if self.policy is None:
            return None
        return CacheSession(
            self.policy,
            share,
            guided=len(self.halves) == 2,
            num_blocks=self.spec.depth,
            num_experts=self.spec.num_experts,
            statistics=statistics,
            device=model.device,
            owner_ranks=self.ep_size if self.location == "owner" else None,
            storage=storage_of(self.config.cache.dtype),
            kernels=model.kernels,
            timer=timer,
        )


def _check_decoder(config: Config, spec: ModelSpec) -> None:
    """Raise UserError for a decoder that is not there, or has no use for the network."""
    if config.sampling.vae is None:
        return
    if not spec.is_latent:
        raise UserError("sampling.vae has no effect: this model generates pixels, not latents; remove it")
    check_autoencoder(config.sampling.vae)

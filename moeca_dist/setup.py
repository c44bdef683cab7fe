"""What all runs of an engine have in common, and what one batch of them is denoised with.

Everything here follows from the configuration, the network and the ranks; a batch adds its requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_dist.cache.policies import build_policy
from moeca_dist.cache.policy import Half, Policy
from moeca_dist.cache.session import HALVES, CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import storage_of
from moeca_dist.config import Config
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.placement import Placement, choose_placement
from moeca_dist.parallel.agreement import agreed
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.parallel.references import RowCoding
from moeca_dist.sampling.calibration import Calibration, FittedFor, fitted_for, fitting_calibration
from moeca_dist.sampling.combine import Combine, Corrected, Guidance, OutputMemory
from moeca_dist.timing import Timer
from moeca_dist.types import Request
from moeca_dist.work import Work


@dataclass(frozen=True)
class Setup:
    """Made once for an engine with ``Setup.of``.

    ``placement``: which side of the exchange keeps branch values, None where it is moot; ``calibration``: None where
    outputs are not corrected.
    """

    config: Config
    mesh: Mesh
    model: DiffusionTransformer
    num_steps: int
    halves: tuple[Half, ...]
    policy: Policy | None
    placement: Placement | None
    calibration: Calibration | None

    @classmethod
    def of(
        cls, config: Config, mesh: Mesh, model: DiffusionTransformer, num_steps: int, calibration: Calibration | None
    ) -> "Setup":
        """``calibration``: of this cache and network, where there is no file of it.

        Raises UserError, on all ranks alike, for a file of another calibration.
        """
        spec, guided = model.spec, config.sampling.cfg_scale != 1
        halves = HALVES if guided else HALVES[:1]
        policy = build_policy(config.cache, num_steps, guided=guided)
        placement = choose_placement(config.cache, policy, spec.num_experts_per_tok, mesh.ep_size)
        path = config.cache.calibration
        if calibration is None and path is not None:
            wanted = fitted_for(config, num_steps, policy, halves, model)
            calibration = agreed(mesh, lambda: fitting_calibration(path, wanted))
        return cls(config, mesh, model, num_steps, halves, policy, placement, calibration)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def work(self, num_images: int, statistics: CacheStatistics) -> Work:
        return Work(self.spec, num_images * len(self.halves) * self.num_steps, self.policy, statistics)

    def fitted_for(self) -> FittedFor:
        """What calibrated weights of these runs depend on."""
        return fitted_for(self.config, self.num_steps, self.policy, self.halves, self.model)

    def combine(self) -> Corrected | None:
        """What takes the place of guidance in one batch, where a calibration is configured."""
        if self.calibration is None or self.policy is None:
            return None
        weights = self.calibration.weights
        memory = OutputMemory(self.policy.is_full, weights.history)
        return Corrected(Guidance(self.config.sampling.cfg_scale), weights, memory)

    def open_session(
        self,
        share: Sequence[Request],
        combine: Combine | None,
        coding: RowCoding | None,
        statistics: CacheStatistics,
        timer: Timer,
    ) -> CacheSession:
        """The caches of one round."""
        assert self.policy is not None

        def bytes_beside() -> int:
            outputs = combine.memory.num_bytes if isinstance(combine, Corrected) else 0
            return outputs + (0 if coding is None else coding.num_bytes)

        return CacheSession(
            self.policy,
            share,
            guided=len(self.halves) == 2,
            num_blocks=self.spec.depth,
            num_experts=self.spec.num_experts,
            statistics=statistics,
            timer=timer,
            device=self.mesh.device,
            owner_ranks=self.mesh.ep_size if self.placement == "owner" else None,
            storage=storage_of(self.config.cache.dtype),
            bytes_beside=bytes_beside,
        )

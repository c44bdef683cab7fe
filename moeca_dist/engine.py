"""Requests in, images out: batching over ranks, the sampling loop, and the report.

Shape suffixes: B images of this rank in a round, C channels, H and W pixels.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from moeca_dist.cache.budget import Budget
from moeca_dist.cache.policies import build_policy
from moeca_dist.cache.policy import Half
from moeca_dist.cache.session import HALVES, CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.cache.storage import storage_of
from moeca_dist.config import CacheConfig, Config, TelemetryConfig, load_config, validate_world
from moeca_dist.errors import UserError
from moeca_dist.memory import cache_size, check_memory
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.loading import check_weights, load_weights
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.placement import Placement, budget_groups, budget_rows, check_exchange, choose_placement
from moeca_dist.observation import Observation, TraceSink, open_gpu
from moeca_dist.parallel.agreement import agreed
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.parallel.placement import ExpertPlacement
from moeca_dist.parallel.placement_table import PlacementTable
from moeca_dist.report import CacheReport, ExchangeReport, FlopsReport, Report, describe_requests
from moeca_dist.sampling.calibration import Calibration, FittedFor, fitting_calibration, read_calibration, weight_norms
from moeca_dist.sampling.combine import Combine, Corrected, Guidance, OutputMemory
from moeca_dist.sampling.guidance import cached, exact
from moeca_dist.sampling.noise import check_stream
from moeca_dist.sampling.sampler import Sampler, sampler_for
from moeca_dist.sampling.step import OnStep
from moeca_dist.telemetry import GpuRecord, merge
from moeca_dist.timing import Seconds, Section
from moeca_dist.types import Request, StepContext
from moeca_dist.vae import LatentDecoder, check_autoencoder, to_uint8
from moeca_dist.work import Work

logger = logging.getLogger(__name__)

Sink = Callable[[Sequence[Request], NDArray[np.generic]], None]


@dataclass
class _Counters:
    """What one run did on this rank."""

    observed: Observation
    started: float = field(default_factory=time.perf_counter)
    denoise_s: float = 0.0
    cache: CacheStatistics = field(default_factory=CacheStatistics)


@dataclass(frozen=True)
class _RankResult:
    """What one rank tells the others at the end of a run."""

    cache: CacheStatistics
    denoise_s: float
    seconds: dict[tuple[int, Section], float]
    bytes_sent: int
    bytes_exact: int
    gpu: GpuRecord | None


class Engine:
    """A network on a mesh of ranks, ready to generate.

    Every rank of the world builds one and calls ``generate`` with the same requests; the images arrive on rank 0.
    Latent models without a decoder produce float32 latents [N, C, H, W] in place of uint8 images [N, H, W, C].
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: DiffusionTransformer,
        decoder: LatentDecoder | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """``calibration``: of this cache and network, where there is no file of it."""
        self.config = config
        self.mesh = mesh
        self.model = model
        self.decoder = decoder
        self.sampler: Sampler = sampler_for(model.spec)
        self.policy = build_policy(config.cache, self.num_steps, guided=self._guided)
        check_exchange(config, self.policy)
        self.placement = self._choose_placement()
        self.budget_rows = self._budget_rows()
        self.calibration = calibration or self._read_calibration()
        self._gpu = open_gpu(config.telemetry, mesh)

    @classmethod
    def from_config(
        cls, config: Config | str | os.PathLike[str], overrides: Sequence[str] = (), *, mesh: Mesh | None = None
    ) -> "Engine":
        """Join the launcher's ranks (unless ``mesh`` is given) and load this rank's part of the model.

        Raises UserError, on every rank alike, for anything wrong with the configuration, the checkpoint or the world
        size, and PeerLostError where other ranks do not arrive.
        """
        config = config if isinstance(config, Config) else load_config(config, overrides)
        mesh = mesh or join(config)
        model = agreed(mesh, lambda: load_weights(config.model, mesh, read_placement(config)))
        return cls(config, mesh, model, agreed(mesh, lambda: _decoder(config, model.spec, mesh)))

    @property
    def num_steps(self) -> int:
        return self.config.sampling.num_steps or self.sampler.default_num_steps

    @property
    def resolved_config(self) -> Config:
        """The configuration with the values that the model and the world decided: running it again is the same run."""
        return resolve(self.config, self.model.spec, self.mesh.world_size)

    @property
    def produces_pixels(self) -> bool:
        return self.decoder is not None or not self.model.spec.is_latent

    def generate(
        self, requests: Sequence[Request], *, progress: bool = False, trace_sink: TraceSink | None = None
    ) -> tuple[NDArray[np.generic], Report]:
        """All images of ``requests`` in their order on rank 0, none on the other ranks; and the report, on all."""
        batches: list[NDArray[np.generic]] = []
        report = self.generate_into(
            lambda _, batch: batches.append(batch), requests, progress=progress, trace_sink=trace_sink
        )
        if batches:
            return np.concatenate(batches), report
        return self._to_samples(torch.empty(0, *self.sampler.shape_CHW)).numpy(), report

    def generate_into(
        self,
        sink: Sink,
        requests: Sequence[Request],
        *,
        progress: bool = False,
        trace_sink: TraceSink | None = None,
        watcher: OnStep | None = None,
    ) -> Report:
        """Call ``sink(requests of the round, their samples)`` on rank 0 after every round; never holds all images.

        With ``telemetry.trace``, ``trace_sink(rank, trace)`` is called there for every rank at the end. ``watcher`` is
        called on this rank after every step of every round.

        A collective of the world: all ranks call it with the same requests. Raises UserError for labels that the
        model does not have and for traces without a sink, and PeerLostError if a rank dies or hangs.
        """
        check_requests(requests, self.model.spec)
        self.check_memory(len(requests))
        observed = Observation(self.config.telemetry, self._gpu, self.mesh, trace_sink)
        counters = self._start(observed)
        rounds = _rounds(requests, self.mesh.world_size, self.config.sampling.batch_size)
        num_steps, silent = len(rounds) * self.num_steps, not (progress and self._is_first)
        with observed, tqdm(total=num_steps, unit="step", desc="denoising", disable=silent) as bar:

            def on_step(step: StepContext) -> None:
                bar.update()
                observed.end_step(step.index)
                if watcher is not None:
                    watcher(step)
                if self.mesh.expert_group is not None:
                    counters.cache.note_bytes(step.index, self.mesh.expert_group.traffic.bytes_sent)

            for shares in rounds:
                samples = self._sample(shares[self.mesh.rank], counters, on_step)
                self._deliver(sink, shares, samples)
        observed.deliver_trace()
        return self._report(requests, counters)

    def check_memory(self, num_images: int) -> None:
        """Raise UserError, on all ranks alike, where the cache of a round would exceed ``cache.memory_limit``.

        A collective of the world where there is a limit. ``generate_into`` asks it; ask it earlier to refuse earlier.
        """
        if self.config.cache.memory_limit is not None:
            agreed(self.mesh, lambda: check_cache_fits(self.config, self.model.spec, self.mesh, num_images))

    def without_cache(self) -> "Engine":
        """The exact path over the same network and ranks, without telemetry: the reference for this engine's images."""
        return self.with_cache(CacheConfig())

    def with_cache(self, cache: CacheConfig) -> "Engine":
        """Another cache over the same network and ranks.

        Without telemetry, and with the exact exchange, which all policies offer.
        """
        parallel = self.config.parallel.model_copy(update=_EXACT_EXCHANGE)
        changes = {"cache": cache, "parallel": parallel, "telemetry": TelemetryConfig()}
        config = self.config.model_copy(update=changes)
        return Engine(config, self.mesh, self.model, self.decoder)

    def denoise(self, share: Sequence[Request], combine: Combine | None = None) -> Tensor:
        """This rank's part of one batch as the solver leaves it: float32 [B, C, H, W] on the model's device.

        ``combine`` takes the place of guidance and of a configured calibration. A collective of the world: all ranks
        call it together, those without images with an empty share. Raises UserError, on all of them, where the cache
        would exceed ``cache.memory_limit``.
        """
        return self.denoise_counting(share, combine)[0]

    def denoise_counting(self, share: Sequence[Request], combine: Combine | None = None) -> tuple[Tensor, FlopsReport]:
        """As ``denoise``, with the work that it was."""
        if self.config.cache.memory_limit is not None:
            size = cache_size(self.config, self.model.spec, self.num_steps, self.mesh.ep_size)
            how = "a batch of"
            agreed(self.mesh, lambda: check_memory(size, self.config.cache, len(share), self.mesh.device, how))
        observed = Observation(TelemetryConfig(), None, self.mesh, None)
        counters = self._start(observed)
        samples_BCHW = self._denoise(share, counters, lambda step: observed.end_step(step.index), combine)
        return samples_BCHW, self._work(len(share), counters.cache).flops()

    def combine(self) -> Corrected | None:
        """What takes the place of guidance in one batch, where a calibration is configured."""
        if self.calibration is None or self.policy is None:
            return None
        weights = self.calibration.weights
        memory = OutputMemory(self.policy.is_full, weights.history)
        return Corrected(Guidance(self.config.sampling.cfg_scale), weights, memory)

    def fitted_for(self) -> FittedFor:
        """What calibrated weights of this run depend on."""
        # Defaults are left out, so that a calibration outlives options that it knows nothing of.
        options = self.config.cache.model_dump(mode="json", exclude_defaults=True)
        cache = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT_ON_VALUES}
        if self.policy is not None:
            cache["full_steps"] = {half: self._full_steps(half) for half in self._halves}
        return FittedFor(cache, self.num_steps, self.config.sampling.cfg_scale, weight_norms(self.model))

    def close(self) -> None:
        """Leave the process groups; the engine cannot generate afterwards."""
        if self._gpu is not None:
            self._gpu.close()
        self.mesh.close()

    @property
    def _is_first(self) -> bool:
        return self.mesh.rank == 0

    @property
    def _guided(self) -> bool:
        return self.config.sampling.cfg_scale != 1

    @property
    def _halves(self) -> tuple[Half, ...]:
        return HALVES if self._guided else HALVES[:1]

    def _full_steps(self, half: Half) -> list[int]:
        policy, num_steps = self.policy, self.num_steps
        assert policy is not None
        return [index for index in range(num_steps) if policy.is_full(StepContext(index, num_steps, 0.0), half)]

    def _read_calibration(self) -> Calibration | None:
        path = self.config.cache.calibration
        return None if path is None else agreed(self.mesh, lambda: fitting_calibration(path, self.fitted_for()))

    @property
    def _is_local(self) -> bool:
        """Whether nothing travels, and the exchange mode means nothing."""
        return self.mesh.expert_group is None and self.config.parallel.exchange == "exact"

    @property
    def _planned(self) -> bool:
        return self.config.parallel.exchange == "planned"

    def _budget(self, num_images: int) -> Budget | None:
        """The rows of one round. A collective of the expert-parallel group: its ranks may have different shares."""
        if self.budget_rows is None:
            return None
        group = self.mesh.expert_group
        most = num_images if group is None else max(group.gather_objects(num_images))
        groups = budget_groups(self.config.parallel, self._experts)
        return Budget(
            self.budget_rows,
            torch.tensor(groups, device=self.mesh.device),
            max(self.config.parallel.budget_groups or 0, self.mesh.ep_size),
            self.mesh.ep_size,
            most,
            self.config.parallel.budget_fill,
        )

    def _budget_rows(self) -> dict[int, int] | None:
        if self.config.parallel.exchange != "budget":
            return None
        spec, parallel = self.model.spec, self.config.parallel
        groups = budget_groups(parallel, self._experts)
        return budget_rows(parallel, spec.moe_blocks, spec.num_tokens, spec.num_experts_per_tok, groups)

    @property
    def _experts(self) -> ExpertPlacement:
        return ExpertPlacement.contiguous(self.model.spec.num_experts, self.mesh.ep_size)

    def _choose_placement(self) -> Placement | None:
        if self.policy is None:
            return None
        spec = self.model.spec
        return choose_placement(
            self.config.cache,
            self.policy,
            self.num_steps,
            self._halves,
            spec.num_experts_per_tok,
            spec.hidden_size * next(self.model.parameters()).element_size(),
            self._experts,
        )

    def _open_session(
        self, share: Sequence[Request], counters: _Counters, combine: Combine | None
    ) -> CacheSession | None:
        """The caches of one round, or None for the exact path."""
        if self.policy is None:
            return None
        return CacheSession(
            self.policy,
            share,
            guided=self._guided,
            num_blocks=self.model.spec.depth,
            num_experts=self.model.spec.num_experts,
            num_experts_per_tok=self.model.spec.num_experts_per_tok,
            statistics=counters.cache,
            timer=counters.observed.timer,
            device=self.mesh.device,
            owner_ranks=self.mesh.ep_size if self.placement == "owner" else None,
            planned=self._planned,
            budget=self._budget(len(share)),
            storage=storage_of(self.config.cache.dtype),
            bytes_beside=lambda: combine.memory.num_bytes if isinstance(combine, Corrected) else 0,
        )

    def _sample(self, share: Sequence[Request], counters: _Counters, on_step: Callable[[StepContext], None]) -> Tensor:
        return self._to_samples(self._denoise(share, counters, on_step, self.combine()))

    def _denoise(
        self,
        share: Sequence[Request],
        counters: _Counters,
        on_step: Callable[[StepContext], None],
        combine: Combine | None,
    ) -> Tensor:
        session = self._open_session(share, counters, combine)
        model = partial(self.model, timer=counters.observed.timer)
        started = time.perf_counter()
        with counters.observed.timer.section("other"):
            samples_BCHW = self.sampler.sample(
                exact(model) if session is None else cached(model, session),
                share,
                cfg_scale=self.config.sampling.cfg_scale,
                num_steps=self.num_steps,
                device=self.mesh.device,
                on_step=on_step,
                combine=combine,
            )
        if samples_BCHW.is_cuda:
            # NOTE: a host synchronisation, once per round, so that the time is that of the work.
            torch.cuda.synchronize(samples_BCHW.device)
        counters.denoise_s += time.perf_counter() - started
        if session is not None:
            session.note_peak()
        return samples_BCHW

    def _to_samples(self, samples_BCHW: Tensor) -> Tensor:
        if self.decoder is not None:
            return self.decoder.decode(samples_BCHW)
        return samples_BCHW.cpu() if self.model.spec.is_latent else to_uint8(samples_BCHW)

    def _deliver(self, sink: Sink, shares: list[Sequence[Request]], samples: Tensor) -> None:
        if self.mesh.world is None:
            sink(shares[0], samples.numpy())
            return
        parts = self.mesh.world.gather_to_first(samples, [len(share) for share in shares])
        if parts is not None:
            sink([request for share in shares for request in share], torch.cat(parts).cpu().numpy())

    def _start(self, observed: Observation) -> _Counters:
        if self.mesh.expert_group is not None:
            self.mesh.expert_group.reset_traffic(observed.timer)
        return _Counters(observed)

    def _work(self, num_images: int, statistics: CacheStatistics) -> Work:
        return Work(self.model.spec, num_images * len(self._halves) * self.num_steps, self.policy, statistics)

    def _report(self, requests: Sequence[Request], counters: _Counters) -> Report:
        num_images = len(requests)
        mesh, group = self.mesh, self.mesh.expert_group
        mine = _RankResult(
            counters.cache,
            counters.denoise_s,
            counters.observed.seconds.per_step(),
            group.traffic.bytes_sent if group else 0,
            int(group.traffic.bytes_exact) if group else 0,
            counters.observed.gpu_record(),
        )
        ranks = mesh.world.gather_objects(mine) if mesh.world is not None else [mine]
        statistics = CacheStatistics()
        for theirs in ranks:
            statistics.merge(theirs.cache)
        work = self._work(num_images, statistics)
        wall_s = time.perf_counter() - counters.started
        remark = None if self.policy is None else self.policy.remark(statistics)
        if remark is not None and self._is_first:
            logger.warning(remark)
        return Report(
            num_images=num_images,
            world_size=mesh.world_size,
            ep_size=mesh.ep_size,
            dp_size=mesh.dp_size,
            num_steps=self.num_steps,
            wall_s=wall_s,
            denoise_s=max(theirs.denoise_s for theirs in ranks),
            images_per_s=num_images / wall_s,
            flops=work.flops(),
            branches=work.branches(),
            exchange=ExchangeReport(
                mode="local" if self._is_local else self.config.parallel.exchange,
                placement=self.placement,
                bytes_sent=sum(theirs.bytes_sent for theirs in ranks),
                bytes_full=work.extrapolated(sum(theirs.bytes_exact for theirs in ranks)),
                collectives=group.traffic.collectives if group else 0,
                collectives_elided=group.traffic.collectives_elided if group else 0,
                agreements=group.traffic.agreements if group else 0,
                bytes_per_step=work.bytes_per_step(),
                budget=work.budget(self.budget_rows or {}),
            ),
            cache=CacheReport(
                self.config.cache.policy, statistics.bytes_peak, work.per_layer(), work.modules(), remark
            ),
            seconds=Seconds.of([theirs.seconds for theirs in ranks], self.num_steps),
            telemetry=merge([theirs.gpu for theirs in ranks], self.config.telemetry.period_s or 0.0, num_images),
            requests=describe_requests(requests),
        )


_EXACT_EXCHANGE = {"exchange": "exact", "budget": None, "budget_groups": None, "budget_fill": False}

# Options of the cache section that change what is computed where, or how full steps are named, but no value.
_WITHOUT_EFFECT_ON_VALUES = frozenset(
    {"calibration", "placement", "memory_limit", "interval", "full_steps", "schedule"}
)


def resolve(config: Config, spec: ModelSpec, world_size: int) -> Config:
    """``config`` with what the model and the number of ranks decide where it leaves it open."""
    num_steps = config.sampling.num_steps or sampler_for(spec).default_num_steps
    sampling = config.sampling.model_copy(update={"num_steps": num_steps})
    parallel = config.parallel.model_copy(update={"ep_size": config.parallel.ep_size or world_size})
    return config.model_copy(update={"sampling": sampling, "parallel": parallel})


def join(config: Config) -> Mesh:
    """The mesh of the ranks that the launcher started, as ``config`` wants it."""
    launcher = LauncherEnv.read()
    validate_world(config, launcher.world_size)
    return Mesh.create(
        launcher,
        ep_size=config.parallel.ep_size,
        device_type=config.model.device,
        backend=config.parallel.backend,
        timeout_s=config.parallel.timeout_s,
    )


def read_placement(config: Config) -> PlacementTable | None:
    """The configured expert placement; UserError for a file that is none. Loading checks that it fits."""
    path = config.parallel.expert_placement
    return None if path is None else PlacementTable.read(path)


def check_config(config: Config, labels: Sequence[int]) -> ModelSpec:
    """Everything about the model and the labels that can be refused without loading weights; cheap.

    Raises UserError for a missing, foreign or inconsistent checkpoint, step counts the sampler does not offer, labels
    that the model does not have, an exchange mode without effect, a calibration that is none, and a decoder that is not
    there or has no use.
    """
    spec = check_weights(config.model)
    sampler = sampler_for(spec)
    num_steps = config.sampling.num_steps or sampler.default_num_steps
    sampler.check_num_steps(num_steps)
    check_exchange(config, build_policy(config.cache, num_steps, guided=config.sampling.cfg_scale != 1))
    if config.parallel.exchange == "budget":
        budget_rows(config.parallel, spec.moe_blocks, spec.num_tokens, spec.num_experts_per_tok, [0] * spec.num_experts)
    if config.cache.calibration is not None:
        read_calibration(config.cache.calibration)
    check_requests([Request(index, label) for index, label in enumerate(labels)], spec)
    _check_decoder(config, spec)
    return spec


def check_cache_fits(config: Config, spec: ModelSpec, mesh: Mesh, num_images: int) -> None:
    """Raise UserError where this rank's cache of a round would exceed ``cache.memory_limit``; needs no weights."""
    num_steps = config.sampling.num_steps or sampler_for(spec).default_num_steps
    per_round = min(num_images, mesh.world_size * config.sampling.batch_size)
    most = -(-per_round // mesh.world_size)
    check_memory(cache_size(config, spec, num_steps, mesh.ep_size), config.cache, most, mesh.device)


def check_requests(requests: Sequence[Request], spec: ModelSpec) -> None:
    """Raise UserError unless every label is one of the model's classes and every noise stream exists."""
    for request in requests:
        check_stream(request.seed, request.index)
        if not 0 <= request.label < spec.num_classes:
            raise UserError(
                f"label {request.label} is out of range: this model has {spec.num_classes} classes, "
                f"0-{spec.num_classes - 1}"
            )


def _rounds(requests: Sequence[Request], world_size: int, batch_size: int) -> list[list[Sequence[Request]]]:
    """Per round the share of every rank: at most ``batch_size`` each, as even as can be, some perhaps empty.

    It follows from the arguments alone, so all ranks make the same number of network evaluations.
    """
    rounds = []
    for start in range(0, len(requests), world_size * batch_size):
        block = requests[start : start + world_size * batch_size]
        bounds = [rank * len(block) // world_size for rank in range(world_size + 1)]
        rounds.append([block[low:high] for low, high in pairwise(bounds)])
    return rounds


def _check_decoder(config: Config, spec: ModelSpec) -> None:
    if config.sampling.vae is None:
        return
    if not spec.is_latent:
        raise UserError("sampling.vae has no effect: this model generates pixels, not latents; remove it")
    check_autoencoder(config.sampling.vae)


def _decoder(config: Config, spec: ModelSpec, mesh: Mesh) -> LatentDecoder | None:
    _check_decoder(config, spec)
    return None if config.sampling.vae is None else LatentDecoder(config.sampling.vae, device=mesh.device)

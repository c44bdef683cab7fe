"""Requests in, images out: batching over ranks, and the sampling loop.

Shape suffixes: B images of this rank in a round, C channels, H and W pixels.
"""

import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from moeca_dist.cache.policy import Policy
from moeca_dist.calibration.file import Calibration, FittedFor
from moeca_dist.checkpoints.from_config import load_weights
from moeca_dist.config import CacheConfig, Config, TelemetryConfig, load_config, validate_world
from moeca_dist.kernels.select import kernels_of
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.parallelize import arrange_layers
from moeca_dist.parallel.agreement import on_all_ranks
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.report.schema import FlopsReport, Report
from moeca_dist.runtime.cache_memory import check_memory
from moeca_dist.runtime.collect_report import RunCounters, collect_report
from moeca_dist.runtime.cuda_graphs import graphed_model
from moeca_dist.runtime.denoise import denoise_batch
from moeca_dist.runtime.rounds import Sink, deliver, shares_by_round
from moeca_dist.runtime.run_plan import RunPlan
from moeca_dist.sampling.denoiser import OnStep
from moeca_dist.sampling.guidance import Combine
from moeca_dist.sampling.latent_decoder import LatentDecoder, to_uint8
from moeca_dist.sampling.sampler import Sampler, sampler_for
from moeca_dist.telemetry.observer import RunObserver, TraceSink, open_gpu_monitor
from moeca_dist.types import Request, StepContext


class Engine:
    """A network on a mesh of ranks, ready to generate.

    Every rank of the world builds one and calls ``generate`` with the same requests. The images arrive on rank 0. They
    are uint8 [N, H, W, C]. Latent models without a decoder produce float32 latents [N, C, H, W] instead.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: DiffusionTransformer,
        decoder: LatentDecoder | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Plan runs of ``model``.

        A collective of the world. Raises UserError, on all ranks alike, as ``RunPlan.resolve`` does, and for a
        calibration of another run.

        Args:
            calibration: of this cache and network, if there is no file of it.
        """
        self.mesh = mesh
        self.decoder = decoder
        self.sampler: Sampler = sampler_for(model.spec)
        self.plan = on_all_ranks(mesh, partial(RunPlan.resolve, config, mesh.world_size, model.spec, calibration))
        on_all_ranks(mesh, partial(self.plan.check_calibration, model))
        kernels = kernels_of(self.config.model.kernels, mesh.device)
        self.model = arrange_layers(model, self.plan.location, self.config.parallel.row_dtype, kernels)
        self.graphed_model = graphed_model(self.plan.config, self.model, mesh)
        self._gpu = open_gpu_monitor(config.telemetry, mesh)

    @classmethod
    def from_config(
        cls, config: Config | str | os.PathLike[str], overrides: Sequence[str] = (), *, mesh: Mesh | None = None
    ) -> "Engine":
        """Join the launcher's ranks (unless ``mesh`` is given) and load this rank's part of the model.

        Raises UserError, on every rank alike, for a wrong configuration, checkpoint or world size. Raises PeerLostError
        if other ranks do not arrive.
        """
        config = config if isinstance(config, Config) else load_config(config, overrides)
        mesh = mesh or join(config)
        plan = on_all_ranks(mesh, partial(RunPlan.resolve, config, mesh.world_size))
        model = on_all_ranks(mesh, partial(load_weights, config.model, mesh, plan.placement))
        return cls(config, mesh, model, on_all_ranks(mesh, partial(_decoder, config, mesh)))

    @property
    def config(self) -> Config:
        """Return the configuration with the values that the model and the world decided.

        Running it again is the same run.
        """
        return self.plan.config

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def policy(self) -> Policy | None:
        return self.plan.policy

    @property
    def calibration(self) -> Calibration | None:
        return self.plan.calibration

    @property
    def produces_pixels(self) -> bool:
        """Return whether samples are images and not latents."""
        return self.decoder is not None or not self.model.spec.is_latent

    def generate(
        self, requests: Sequence[Request], *, progress: bool = False, trace_sink: TraceSink | None = None
    ) -> tuple[NDArray[np.generic], Report]:
        """Generate all images of ``requests``.

        Returns:
            The images in order on rank 0, none on other ranks. The report is returned on all of them.
        """
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
        """Call ``sink(requests of the round, their samples)`` on rank 0 after every round.

        Samples of earlier rounds are not held. A collective of the world: all ranks call it with the same requests.
        Raises UserError for labels that the model does not have and for traces without a sink. Raises PeerLostError if
        a rank dies or hangs.

        Args:
            trace_sink: called as ``trace_sink(rank, trace)`` on rank 0 for every rank at the end, with
                ``telemetry.trace``.
            watcher: called on this rank after every step of every round.
        """
        self.plan.check_requests(requests)
        self.check_memory(len(requests))
        observer = RunObserver(self.config.telemetry, self._gpu, self.mesh, trace_sink)
        counters = self._start(observer)
        rounds = shares_by_round(requests, self.mesh.world_size, self.config.sampling.batch_size)
        num_steps, silent = len(rounds) * self.num_steps, not (progress and self.mesh.rank == 0)
        with observer, tqdm(total=num_steps, unit="step", desc="denoising", disable=silent) as bar:

            def on_step(step: StepContext) -> None:
                bar.update()
                if watcher is not None:
                    watcher(step)

            for shares in rounds:
                samples_BCHW = self._denoise(shares[self.mesh.rank], counters, on_step, self.plan.combine())
                deliver(sink, self.mesh, shares, self._to_samples(samples_BCHW))
        observer.deliver_trace()
        return collect_report(self.plan, self.mesh, requests, counters)

    def check_memory(self, num_images: int) -> None:
        """Raise UserError, on all ranks alike, if the cache of a round would exceed ``cache.memory_limit``.

        A collective of the world if there is a limit. ``generate_into`` calls it. Call it earlier to refuse earlier.
        """
        if self.config.cache.memory_limit is not None:
            on_all_ranks(self.mesh, partial(self.plan.check_memory, num_images, self.mesh.device))

    def without_cache(self) -> "Engine":
        """Return the exact path over the same network and ranks: the reference for this engine's images."""
        return self.with_cache(CacheConfig())

    def with_cache(self, cache: CacheConfig, calibration: Calibration | None = None) -> "Engine":
        """Return an engine with another cache over the same network and ranks.

        Its rows travel as computed, and it has no telemetry. ``calibration``: of the cache, if there is no file.
        """
        graphs = self.config.model.cuda_graphs and cache.policy == "none"
        model = self.config.model.model_copy(update={"cuda_graphs": graphs})
        parallel = self.config.parallel.model_copy(update={"row_dtype": "exact"})
        changes = {"model": model, "parallel": parallel, "cache": cache, "telemetry": TelemetryConfig()}
        return Engine(self.config.model_copy(update=changes), self.mesh, self.model, self.decoder, calibration)

    def denoise(self, share: Sequence[Request], combine: Combine | None = None) -> Tensor:
        """Return this rank's part of one batch as the solver leaves it: float32 [B, C, H, W] on the model's device.

        ``combine`` takes the place of guidance and of a configured calibration. A collective of the world: all ranks
        call it together, those without images with an empty share. Raises UserError, on all of them, if the cache
        would exceed ``cache.memory_limit``.
        """
        return self.denoise_counting(share, combine)[0]

    def denoise_counting(self, share: Sequence[Request], combine: Combine | None = None) -> tuple[Tensor, FlopsReport]:
        """Return what ``denoise`` does, and the operations that it took."""
        if self.config.cache.memory_limit is not None:
            how = "a batch of"
            check = partial(check_memory, self.plan.cache_size(), self.config.cache, len(share), self.mesh.device, how)
            on_all_ranks(self.mesh, check)
        observer = RunObserver(TelemetryConfig(), None, self.mesh, None)
        counters = self._start(observer)
        samples_BCHW = self._denoise(share, counters, None, combine)
        return samples_BCHW, self.plan.figures(len(share), counters.cache).flops()

    def fitted_for(self) -> FittedFor:
        """Return what calibrated weights of this engine's runs depend on."""
        return self.plan.fitted_for(self.model)

    def close(self) -> None:
        """Leave the process groups. The engine cannot generate afterwards."""
        if self._gpu is not None:
            self._gpu.close()
        self.mesh.close()

    def _denoise(
        self, share: Sequence[Request], counters: RunCounters, watcher: OnStep | None, combine: Combine | None
    ) -> Tensor:
        graphed = self.graphed_model if share else None
        return denoise_batch(self.plan, self.model, graphed, self.mesh, share, counters, watcher, combine)

    def _to_samples(self, samples_BCHW: Tensor) -> Tensor:
        if self.decoder is not None:
            return self.decoder.decode(samples_BCHW)
        return samples_BCHW.cpu() if self.model.spec.is_latent else to_uint8(samples_BCHW)

    def _start(self, observer: RunObserver) -> RunCounters:
        if self.mesh.expert_group is not None:
            self.mesh.expert_group.reset_traffic(observer.timer)
        return RunCounters(observer)


def join(config: Config) -> Mesh:
    """Return the mesh of the ranks that the launcher started, as ``config`` wants it."""
    launcher = LauncherEnv.read()
    validate_world(config, launcher.world_size)
    return Mesh.create(
        launcher,
        ep_size=config.parallel.ep_size,
        device_type=config.model.device,
        backend=config.parallel.backend,
        timeout_s=config.parallel.timeout_s,
    )


def _decoder(config: Config, mesh: Mesh) -> LatentDecoder | None:
    return None if config.sampling.vae is None else LatentDecoder(config.sampling.vae, device=mesh.device)

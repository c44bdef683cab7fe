"""One batch through the sampling loop, with its caches and its counts.

Shape suffixes: B images of this rank, C channels, H and W pixels.
"""

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from moeca_dist.calibration.correction import Corrected
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.collect_report import RunCounters
from moeca_dist.runtime.cuda_graphs import GraphedModel
from moeca_dist.runtime.run_plan import RunPlan
from moeca_dist.sampling.denoiser import OnStep
from moeca_dist.sampling.guidance import Combine, cached, exact
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request, StepContext


def denoise_batch(
    plan: RunPlan,
    model: DiffusionTransformer,
    graphed: GraphedModel | None,
    mesh: Mesh,
    share: Sequence[Request],
    counters: RunCounters,
    watcher: OnStep | None,
    combine: Combine | None,
) -> Tensor:
    """Return float32 [B, C, H, W] on the model's device. A collective of the world, also for an empty ``share``.

    Args:
        graphed: runs in place of ``model`` in batches without a cache. None: the model itself.
        watcher: called after every step, when its counts are in.
    """
    timer = counters.observer.timer
    session = plan.open_session(share, model, counters.cache, timer)
    memory = combine.memory if isinstance(combine, Corrected) else None

    def on_step(step: StepContext) -> None:
        counters.end_step(step, session, memory, mesh.expert_group)
        if watcher is not None:
            watcher(step)

    if session is None:
        network = exact(partial(graphed or model, timer=timer))
    else:
        network = cached(partial(model, timer=timer), session)
    started = time.perf_counter()
    with timer.section("other"):
        samples_BCHW = sampler_for(plan.spec).sample(
            network,
            share,
            cfg_scale=plan.config.sampling.cfg_scale,
            num_steps=plan.num_steps,
            device=mesh.device,
            on_step=on_step,
            combine=combine,
        )
    if samples_BCHW.is_cuda:
        # NOTE: a host synchronisation, once per round, so that the time is that of the work.
        torch.cuda.synchronize(samples_BCHW.device)
    counters.denoise_s += time.perf_counter() - started
    return samples_BCHW

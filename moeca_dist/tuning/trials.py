"""Searches by proxy and real runs, each made once: what tuning asks questions of.

All ranks ask the same questions in the same order. Searches run on rank 0 and their answers are shared; real runs are
made by all ranks together, and their figures are gathered, so what follows from answers is the same everywhere.

Shape suffixes: B images.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeca_dist.calibration.correction import OutputWeights
from moeca_dist.config import CacheConfig
from moeca_dist.evaluation.paired import psnr_db, squared_error, unit_images
from moeca_dist.report.schema import FlopsReport
from moeca_dist.runtime.engine import Engine
from moeca_dist.tuning.calibrate import FittedRun, Recording, corrected, fit, record, share_of, summed
from moeca_dist.tuning.candidate import Candidate, Figures, Trial
from moeca_dist.tuning.proxy import Proxy
from moeca_dist.tuning.resume import StateFile
from moeca_dist.tuning.schedules import Schedule, neighbour
from moeca_dist.tuning.search import Search
from moeca_dist.tuning.trajectories import make_profile
from moeca_dist.types import Request

# Per number of full steps; a generation scores 64 schedules.
GENERATIONS = 60
# Neighbours of the best schedule that the proxy looks at before one is run.
LOOKED_AT = 24


@dataclass(frozen=True)
class ImageSet:
    """A batch of requests over all ranks, with this rank's exact trajectories."""

    requests: Sequence[Request]
    share: Sequence[Request]
    recording: Recording


@dataclass
class Trials:
    """``by_candidate`` and ``searches`` hold all answers so far; ``state`` keeps them, on rank 0."""

    engine: Engine
    fit_on: ImageSet
    proxy: Proxy
    seed: int
    state: StateFile | None
    by_candidate: dict[Candidate, Trial] = field(default_factory=dict)
    searches: dict[int, tuple[Schedule, ...]] = field(default_factory=dict)
    on_answer: Callable[[], None] = lambda: None

    @classmethod
    def open(
        cls,
        engine: Engine,
        fit_on: Sequence[Request],
        seed: int,
        state: StateFile | None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> "Trials":
        """Record ``fit_on`` and take up what an earlier run found. A collective of the world."""
        images = image_set(engine, fit_on, keep_halves=True)
        profile = make_profile(images.recording, engine.mesh)
        trials = cls(engine, images, Proxy(profile, engine.sampler.gains), seed, state, on_answer=on_answer)
        for found in trials._from_first(state.records if state is not None else []):
            if "trial" in found:
                trial = Trial.from_json(found["trial"])
                trials.by_candidate[trial.candidate] = trial
            else:
                trials.searches[found["total"]] = tuple(_schedule(tree) for tree in found["schedules"])
        return trials

    @property
    def num_steps(self) -> int:
        return self.engine.num_steps

    @property
    def num_halves(self) -> int:
        return self.proxy.profile.num_halves

    def schedules(self, total: int) -> tuple[Schedule, ...]:
        """The best few schedules by proxy with ``total`` full steps of all halves together, distinct, best first."""
        if total not in self.searches:
            search = None
            if self.engine.mesh.rank == 0:
                search = Search(self.proxy.mean_db, total, self.num_steps, self.num_halves, self.seed)
            for _ in range(GENERATIONS):
                if search is not None:
                    search.advance()
                # Ranks that only wait would otherwise take a long search for a lost peer.
                self._from_first(None)
            found = self._from_first(None if search is None else tuple(search.best(4, apart=3)))
            self.searches[total] = found
            self._keep({"total": total, "schedules": found})
            self.on_answer()
        return self.searches[total]

    def trial(self, candidate: Candidate) -> Trial:
        """A real run of ``candidate`` on the images that it is fitted on."""
        if candidate not in self.by_candidate:
            run = self.fitted(candidate.cache())
            figures = self._figures(run.samples_BCHW, run.flops, self.fit_on)
            self.by_candidate[candidate] = Trial(figures.speedup, figures.db, candidate)
            self._keep({"trial": self.by_candidate[candidate].to_json()})
            self.on_answer()
        return self.by_candidate[candidate]

    def fitted(self, cache: CacheConfig) -> FittedRun:
        """Weights for ``cache``."""
        return fit(self.engine.with_cache(cache), self.fit_on.share, self.fit_on.recording)

    def measured(self, cache: CacheConfig, weights: OutputWeights | None, images: ImageSet) -> Figures:
        """``cache`` on images that it was not fitted on, with ``weights`` or with plain guidance."""
        engine = self.engine.with_cache(cache)
        combine = None if weights is None else corrected(engine, weights)
        return self._figures(*engine.denoise_counting(images.share, combine), images)

    def neighbour(self, schedule: Schedule, tried: set[Schedule], number: int) -> Schedule | None:
        """The best by proxy of some random neighbours that were not tried; None where there is no other."""
        draw = random.Random(f"{self.seed} {schedule} {number}")
        others = {neighbour(schedule, self.num_steps, draw) for _ in range(LOOKED_AT)} - tried
        if not others:
            return None
        best = None
        if self.engine.mesh.rank == 0:
            ordered = sorted(others)
            best = ordered[int(torch.tensor(self.proxy.mean_db(ordered)).argmax())]
        chosen: Schedule = self._from_first(best)
        return chosen

    def _figures(self, samples_BCHW: Tensor, flops: FlopsReport, images: ImageSet) -> Figures:
        mesh = self.engine.mesh
        full, computed = summed(mesh, torch.tensor([flops.full, flops.computed], dtype=torch.float64)).tolist()
        db_B = closeness_db(samples_BCHW, images.recording.samples_BCHW, latent=self.engine.model.spec.is_latent)
        shares = [db_B.tolist()] if mesh.world is None else mesh.world.gather_objects(db_B.tolist())
        return Figures(full / computed, tuple(db for share in shares for db in share))

    def _from_first(self, answer: Any) -> Any:
        """What rank 0 says, on all ranks."""
        mesh = self.engine.mesh
        return answer if mesh.world is None else mesh.world.gather_objects(answer)[0]

    def _keep(self, record: dict[str, Any]) -> None:
        if self.state is not None:
            self.state.add(record)


def image_set(engine: Engine, requests: Sequence[Request], *, keep_halves: bool = False) -> ImageSet:
    """Record ``requests`` as one batch. A collective of the world."""
    share = share_of(engine, requests)
    return ImageSet(requests, share, record(engine, share, keep_halves=keep_halves))


def closeness_db(samples_BCHW: Tensor, exact_BCHW: Tensor, *, latent: bool) -> Tensor:
    """float64 [B] on the host: PSNR of images, or energy of the exact latents over that of the difference, in dB."""
    if not latent:
        return psnr_db(squared_error(unit_images(samples_BCHW), unit_images(exact_BCHW))).cpu()
    off_B = (samples_BCHW - exact_BCHW).double().square().flatten(1).sum(1)
    return psnr_db(off_B / exact_BCHW.double().square().flatten(1).sum(1)).cpu()


def _schedule(tree: Sequence[Sequence[int]]) -> Schedule:
    return tuple(tuple(steps) for steps in tree)

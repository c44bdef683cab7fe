"""Tuning: profile, search by proxy, confirm by real runs, and measure the choice on images that nothing has seen."""

from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm

from moeca_dist.calibration.correction import OutputWeights
from moeca_dist.calibration.file import Calibration
from moeca_dist.config import CacheConfig
from moeca_dist.errors import UserError
from moeca_dist.runtime.engine import Engine
from moeca_dist.tuning.candidate import Candidate, Figures, Trial
from moeca_dist.tuning.choose import Selector
from moeca_dist.tuning.resume import StateFile
from moeca_dist.tuning.schedules import even, num_full
from moeca_dist.tuning.target import Target
from moeca_dist.tuning.trials import ImageSet, Trials, image_set
from moeca_dist.types import Request


@dataclass(frozen=True)
class Settings:
    """``seed``: of the images to fit on; the next two are of the images to check the choice and to report it on."""

    target: Target
    num_images: int
    seed: int
    refinements: int

    def requests(self, engine: Engine, offset: int) -> list[Request]:
        classes = engine.model.spec.num_classes
        return [Request(index, index % classes, self.seed + offset) for index in range(self.num_images)]


@dataclass(frozen=True)
class Comparison:
    """A schedule on the held-out images, without and with a calibration of its own."""

    name: str
    plain: Figures
    calibrated: Figures | None


@dataclass(frozen=True)
class Tuned:
    """What was chosen; ``predicted`` by proxy on the fitted images, ``chosen`` by a real run on them."""

    settings: Settings
    chosen: Trial
    predicted: Figures
    held_out: Figures
    checked: Figures | None
    comparisons: tuple[Comparison, ...]
    trials: tuple[Trial, ...]
    calibration: Calibration
    num_searches: int


def run_identity(engine: Engine, settings: Settings) -> dict[str, Any]:
    """What a state file must agree with to be gone on with."""
    fitted_for = engine.without_cache().fitted_for()
    return {
        "num_steps": fitted_for.num_steps,
        "cfg_scale": fitted_for.cfg_scale,
        "norms": list(fitted_for.norms),
        "model": engine.config.model.model_dump(mode="json"),
        "num_images": settings.num_images,
        "seed": settings.seed,
    }


def tune(engine: Engine, settings: Settings, state: StateFile | None = None, *, progress: bool = False) -> Tuned:
    """Choose a cache for ``settings.target``; ``engine``'s own cache is compared with it.

    A collective of the world: all ranks call it with the same settings, rank 0 with a ``state`` file if any. The
    exact trajectories are kept meanwhile: four tensors per step, image and rank. Raises UserError for a target that
    cannot be reached, naming the best reached.
    """
    check_target(engine, settings.target)
    engine.plan.check_requests(settings.requests(engine, 0))
    # How many there will be depends on what they find.
    with tqdm(unit=" searches and runs", desc="tuning", disable=not progress) as bar:
        trials = Trials.open(engine, settings.requests(engine, 0), settings.seed, state, lambda: _tick(bar))
        selector = Selector(trials, settings.target, settings.refinements)
        selector.ladder()
        chosen, checked = _checked(selector, selector.choose(), settings)
    held_out = image_set(engine, settings.requests(engine, 2))
    run = trials.fitted(chosen.candidate.cache())
    weights = run.fitted.weights
    figures = trials.measured(chosen.candidate.cache(), weights, held_out)
    comparisons = _comparisons(trials, chosen.candidate, figures, held_out)
    calibration = Calibration(
        engine.with_cache(chosen.candidate.cache()).fitted_for(),
        weights,
        _fitted_on(engine, settings, comparisons[0], figures),
    )
    schedule = chosen.candidate.schedule
    predicted = Figures(chosen.speedup, tuple(trials.proxy.psnr_db([schedule])[0].tolist()))
    return Tuned(
        settings,
        chosen,
        predicted,
        figures,
        checked,
        comparisons,
        tuple(selector.tried.values()),
        calibration,
        len(trials.searches),
    )


def _tick(bar: "tqdm[NoReturn]") -> None:
    bar.update()


def check_target(engine: Engine, target: Target) -> None:
    """Raise UserError for a target that means nothing for the model."""
    if target.kind == "psnr" and engine.model.spec.is_latent:
        raise UserError("--target-psnr needs images, and this model generates latents: give --target-speedup")


def _checked(selector: Selector, chosen: Trial, settings: Settings) -> tuple[Trial, Figures | None]:
    """The choice, made more faithful until it meets a quality target on images that it was not fitted on."""
    if settings.target.kind != "psnr":
        return chosen, None
    trials = selector.trials
    images = image_set(trials.engine, settings.requests(trials.engine, 1))
    while True:
        cache = chosen.candidate.cache()
        figures = trials.measured(cache, trials.fitted(cache).fitted.weights, images)
        if figures.bound_db >= settings.target.value:
            return chosen, figures
        chosen = selector.more_faithful(chosen)


def _comparisons(trials: Trials, chosen: Candidate, figures: Figures, images: ImageSet) -> tuple[Comparison, ...]:
    """Compare the choice, whose calibrated ``figures`` are known, with others.

    These are a uniform schedule of as many full steps, and the cache that the configuration came with.
    """
    rows = [Comparison("tuned", trials.measured(chosen.cache(), None, images), figures)]
    uniform = Candidate(
        chosen.policy, chosen.order, even(num_full(chosen.schedule), trials.num_steps, trials.num_halves)
    )
    others: list[tuple[str, CacheConfig]] = [("uniform", uniform.cache())]
    own = trials.engine.config.cache.model_copy(update={"calibration": None})
    if own.policy != "none":
        others.append((f"as configured ({own.policy})", own))
    for name, other in others:
        plain = trials.measured(other, None, images)
        policy = trials.engine.with_cache(other).policy
        fits = policy is not None and policy.is_scheduled
        rows.append(Comparison(name, plain, trials.measured(other, _weights(trials, other), images) if fits else None))
    return tuple(rows)


def _weights(trials: Trials, cache: CacheConfig) -> OutputWeights:
    return trials.fitted(cache).fitted.weights


def _fitted_on(engine: Engine, settings: Settings, comparison: Comparison, figures: Figures) -> dict[str, Any]:
    def measured(of: Figures) -> dict[str, float]:
        return {"mean_db": of.mean_db, "bound_db": of.bound_db, "speedup": of.speedup}

    return {
        "num_images": settings.num_images,
        "seeds": [settings.seed],
        "held_out": {"num_images": settings.num_images, "seeds": [settings.seed + 2]},
        "before": measured(comparison.plain),
        "after": measured(figures),
    }

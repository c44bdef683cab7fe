"""A cache for a network that nobody has tuned: placed and calibrated on a few images of its own before the first batch.

The images are not those of the requests: results must not depend on what is generated together. They are few, so
nothing is taken on trust: other images decide whether the weights are used at all.
"""

import logging

from moeca_dist.cache.policies.network_forecast import DEFAULT_ORDER
from moeca_dist.calibration.file import Calibration
from moeca_dist.config import CacheConfig, QualityName
from moeca_dist.errors import UserError
from moeca_dist.runtime.engine import Engine
from moeca_dist.tuning.candidate import Candidate, Figures
from moeca_dist.tuning.trials import ImageSet, Trials, image_set
from moeca_dist.types import Request

logger = logging.getLogger(__name__)

NUM_IMAGES = 8
# Apart from seeds that people choose.
SEED = 2**32 - 2
# Of all evaluations, how many are full: about 6, 4.5 and 3 times fewer FLOPs.
SHARES: dict[QualityName, float] = {"draft": 0.16, "balanced": 0.22, "faithful": 0.33}
# What a target in decibels goes through, from the fastest on; then the exact path.
STEPS = (0.12, 0.16, 0.22, 0.28, 0.35, 0.45, 0.6)


def automatic(engine: Engine, quality: QualityName | None, target_psnr_db: float | None) -> Engine:
    """``engine`` with a placed and calibrated network forecast. A collective of the world.

    Its own cache section is replaced. Without ``quality``: the fastest that gives ``target_psnr_db`` to 95% of all
    images by those of the check, the exact path if none does. Raises UserError for a target in decibels on latents.
    """
    if engine.model.spec.is_latent and target_psnr_db is not None:
        raise UserError("--target-psnr needs images, and this model generates latents: give --quality")
    trials = Trials.open(engine.without_cache(), _requests(engine, SEED), SEED, None)
    check = image_set(engine, _requests(engine, SEED + 1))
    shares = STEPS if quality is None else (SHARES[quality],)
    for share in shares:
        cache, calibration, figures = _calibrated(trials, check, share)
        if target_psnr_db is None or figures.bound_db >= target_psnr_db:
            _say(
                engine,
                f"calibrated cache: {figures.speedup:.2f}x fewer FLOPs, {figures.mean_db:.1f} dB on average",
            )
            return _with(engine, cache, calibration)
    _say(engine, f"no cache gives {target_psnr_db:g} dB to 95% of the images: everything is computed")
    return _with(engine, CacheConfig(), None)


def _with(engine: Engine, cache: CacheConfig, calibration: Calibration | None) -> Engine:
    """The run that was asked for, telemetry included, with another cache."""
    config = engine.config.model_copy(update={"cache": cache})
    return Engine(config, engine.mesh, engine.model, engine.decoder, calibration)


def _calibrated(trials: Trials, check: ImageSet, share: float) -> tuple[CacheConfig, Calibration | None, Figures]:
    total = max(trials.num_halves, round(share * trials.num_halves * trials.num_steps))
    cache = Candidate("network_forecast", DEFAULT_ORDER, trials.schedules(total)[0]).cache()
    weights = trials.fitted(cache).fitted.weights
    plain, corrected = trials.measured(cache, None, check), trials.measured(cache, weights, check)
    if corrected.mean_db <= plain.mean_db:
        # Too few images for this network: weights that do not help others are not used.
        return cache, None, plain
    fitted_on = {"num_images": NUM_IMAGES, "seeds": [SEED]}
    return cache, Calibration(trials.engine.with_cache(cache).fitted_for(), weights, fitted_on), corrected


def _requests(engine: Engine, seed: int) -> list[Request]:
    return [Request(index, index % engine.model.spec.num_classes, seed) for index in range(NUM_IMAGES)]


def _say(engine: Engine, text: str) -> None:
    if engine.mesh.rank == 0:
        logger.warning(text)

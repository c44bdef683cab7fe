"""By how much a cache takes images further from a reference as a set: the rise of their Frechet distance.

FD(cached, reference) - FD(uncached, reference), for images of the same seeds. A distance between sets is biased by how
many images they have, alike on both sides of the difference; and most of what depends on which images are drawn cancels
in it, so that its interval is much narrower than that of either distance.

Shape suffixes: N images, M references, F features, H and W pixels, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeca_dist.engine import Engine
from moeca_dist.errors import UserError
from moeca_dist.evaluation.distribution import Gaussian, frechet_distance
from moeca_dist.evaluation.features import POOLED, FeatureNetwork, open_network
from moeca_dist.evaluation.images import ImageSet, find_images, read_statistics
from moeca_dist.evaluation.intervals import draws, standard_error_interval
from moeca_dist.evaluation.request import STATISTICS
from moeca_dist.parallel.agreement import agreed
from moeca_dist.types import Request

RESAMPLES = 100
DEFAULT_IMAGES = 1000
_CHUNK = 64


@dataclass(frozen=True)
class Rise:
    """Both distances, and the 95% confidence interval of their difference."""

    cached: float
    uncached: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.cached - self.uncached

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Against:
    """What is asked for: ``reference`` as in ``moeca evaluate``, ``features`` a file or ``digits``; None: enough."""

    reference: Path
    features: str
    num_images: int | None = None

    def identity(self) -> dict[str, Any]:
        return {"reference": str(self.reference), "features": self.features, "num_images": self.num_images}


@dataclass(frozen=True)
class Reference:
    """``images``: how many are generated of each set. Network and features are there on rank 0 alone."""

    against: Against
    images: int
    network: FeatureNetwork | None
    features_MF: NDArray[np.float32] | None
    gaussian: Gaussian | None

    @classmethod
    def open(cls, engine: Engine, against: Against) -> "Reference":
        """Read the reference. A collective of the world.

        Raises UserError for latents, a reference or network that does not fit, and less images than features.
        """
        if not engine.produces_pixels:
            raise UserError("--max-fid-rise needs images, and this model generates latents: set sampling.vae")

        def read() -> "Reference | None":
            if engine.mesh.rank:
                return None
            found = find_images(against.reference)
            network = open_network(against.features, engine.mesh.device.type, _shape_of(engine, found))
            width = network.widths[POOLED]
            images = against.num_images or max(DEFAULT_IMAGES, 2 * width)
            if images <= width:
                raise UserError(
                    f"--fid-images {images}: the covariance of {width} features takes at least {width + 1} images"
                )
            if set(STATISTICS["frechet"]) <= found.statistics:
                gaussian = Gaussian.from_covariance(*read_statistics(found, *STATISTICS["frechet"]))
                if len(gaussian.mean_F) != width:
                    raise UserError(
                        f"{against.reference} keeps statistics of {len(gaussian.mean_F)} features, {against.features} "
                        f"has {width}: they are of another network"
                    )
                return cls(against, images, network, None, gaussian)
            if found.num_images <= width:
                raise UserError(
                    f"--reference {against.reference} has {found.num_images} images: the covariance of {width} "
                    f"features takes at least {width + 1}"
                )
            return cls(against, images, network, _features_of(found, network), None)

        mine = agreed(engine.mesh, read)
        images = 0 if mine is None else mine.images
        if engine.mesh.world is not None:
            images = engine.mesh.world.gather_objects(images)[0]
        return mine or cls(against, images, None, None, None)

    def drawn(self, resample: int) -> Gaussian:
        """The reference with its images drawn anew; statistics stay as they are."""
        if self.gaussian is not None:
            return self.gaussian
        assert self.features_MF is not None
        return Gaussian.fit(self.features_MF, draws(len(self.features_MF), resample, 0, 1))

    def fitted(self) -> Gaussian:
        if self.gaussian is not None:
            return self.gaussian
        assert self.features_MF is not None
        return Gaussian.fit(self.features_MF)


class FrechetTest:
    """Measures caches on images of one seed; the uncached ones are made once."""

    def __init__(self, engine: Engine, reference: Reference, seed: int) -> None:
        """``engine``: without a cache. A collective of the world, as ``rise``."""
        classes = engine.model.spec.num_classes
        self._reference = reference
        self._requests = [Request(index, index % classes, seed) for index in range(reference.images)]
        self._uncached_NF = self._features(engine)

    def rise(self, engine: Engine) -> Rise:
        """That of ``engine``'s cache; the same on all ranks."""
        cached_NF = self._features(engine)
        mesh = engine.mesh
        found: list[float] = []
        for resample in range(RESAMPLES):
            if mesh.rank == 0:
                found.append(self._drawn_rise(cached_NF, resample))
            if mesh.world is not None:
                # Ranks that only wait would otherwise take many resamples for a lost peer.
                mesh.world.barrier()
        rise = None
        if mesh.rank == 0:
            exact = self._reference.fitted()
            cached, uncached = (
                frechet_distance(Gaussian.fit(features_NF), exact) for features_NF in (cached_NF, self._uncached_NF)
            )
            interval = standard_error_interval(cached - uncached, found, floor=-math.inf)
            assert interval is not None
            rise = Rise(cached, uncached, interval.low, interval.high)
        shared: Rise = rise if mesh.world is None else mesh.world.gather_objects(rise)[0]  # type: ignore[assignment]
        return shared

    def _drawn_rise(self, cached_NF: NDArray[np.float32], resample: int) -> float:
        # Pairs are drawn together: the same images with and without the cache.
        times_N = draws(len(cached_NF), resample, 0)
        exact = self._reference.drawn(resample)
        cached, uncached = (
            frechet_distance(Gaussian.fit(features_NF, times_N), exact)
            for features_NF in (cached_NF, self._uncached_NF)
        )
        return cached - uncached

    def _features(self, engine: Engine) -> NDArray[np.float32]:
        """[N, F] on rank 0, nothing elsewhere."""
        parts: list[NDArray[np.float32]] = []

        def add(_: Sequence[Request], images_NHWC: NDArray[np.generic]) -> None:
            network = self._reference.network
            assert network is not None
            parts.append(network.features(images_NHWC.astype(np.uint8, copy=False))[POOLED])

        engine.generate_into(add, self._requests)
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _features_of(images: ImageSet, network: FeatureNetwork) -> NDArray[np.float32]:
    parts = []
    with images.open() as reader:
        for start in range(0, images.num_images, _CHUNK):
            parts.append(network.features(reader.read(start, min(start + _CHUNK, images.num_images)))[POOLED])
    return np.concatenate(parts)


def _shape_of(engine: Engine, reference: ImageSet) -> tuple[int, int, int]:
    """Of the images that the engine makes; UserError where the reference's have another."""
    height, width, channels = engine.image_shape_HWC
    if reference.shape_HWC not in (None, (height, width, channels)):
        raise UserError(
            f"the images differ in size: this model makes {height} x {width} x {channels}, {reference.describe()}"
        )
    return height, width, channels

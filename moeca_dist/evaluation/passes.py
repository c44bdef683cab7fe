"""Passes over the images: the work of one process on its share of them.

Shape suffixes: N images, B images of one chunk, C channels, H and W pixels, F features.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeca_dist.evaluation.distribution import Gaussian, frechet_distance
from moeca_dist.evaluation.features import open_network
from moeca_dist.evaluation.image_sets import ImageSet
from moeca_dist.evaluation.intervals import draws
from moeca_dist.evaluation.lpips import Perceptual
from moeca_dist.evaluation.paired import squared_error, ssim, unit_images

Pass = Literal["paired", "out", "reference"]
# Values (bytes of uint8 images) that are read at once, and those that float64 metrics work on at once.
_READ_VALUES, _MOST_IMAGES = 2**22, 32
_PAIRED_VALUES = 2**18


@dataclass(frozen=True)
class Chunk:
    """Images start..stop-1 in one of the passes: pairs, features of OUT, or features of REF."""

    of: Pass
    start: int
    stop: int


def chunks(of: Pass, images: ImageSet) -> list[Chunk]:
    """Split the whole set into pieces small enough to hold."""
    assert images.shape_HWC is not None
    step = min(_MOST_IMAGES, max(1, _READ_VALUES // int(np.prod(images.shape_HWC))))
    return [Chunk(of, start, min(start + step, images.num_images)) for start in range(0, images.num_images, step)]


@dataclass(frozen=True)
class FeatureFile:
    """A file of float32 features [N, F] of one layer of a set. All processes write their rows into it."""

    path: Path
    layer: str

    def create(self, num_images: int, width: int) -> None:
        np.lib.format.open_memmap(self.path, mode="w+", dtype=np.float32, shape=(num_images, width))

    def write(self, start: int, features_BF: NDArray[np.float32]) -> None:
        # Opened anew each time: pages of a mapping that stays would count as this process's memory.
        mapped = np.lib.format.open_memmap(self.path, mode="r+")
        mapped[start : start + len(features_BF)] = features_BF

    def read(self) -> NDArray[np.float32]:
        """Return the features mapped from the file, not loaded."""
        return np.asanyarray(np.lib.format.open_memmap(self.path, mode="r"))


@dataclass(frozen=True)
class Measure:
    """A function that reads images and measures them. Every process calls it with its share of the chunks.

    It yields each chunk with the values of ``paired_values``. Features go into ``files`` and yield no values.
    """

    out: ImageSet
    reference: ImageSet
    paired: frozenset[str]
    lpips: str | None
    features: str | None
    files: Mapping[Pass, tuple[FeatureFile, ...]]
    device: str

    def __call__(self, share: Sequence[Chunk]) -> Iterator[tuple[Chunk, dict[str, NDArray[np.float64]]]]:
        passes = {chunk.of for chunk in share}
        perceptual = Perceptual(self.lpips, self.device) if self.lpips and "paired" in passes else None
        network = None
        if self.features and passes - {"paired"}:
            assert self.out.shape_HWC is not None
            network = open_network(self.features, self.device, self.out.shape_HWC)
        with ExitStack() as stack:
            out = stack.enter_context(self.out.open())
            # A reference of statistics alone has no images to open.
            reference = stack.enter_context(self.reference.open()) if passes & {"paired", "reference"} else None
            for chunk in share:
                reader = reference if chunk.of == "reference" else out
                assert reader is not None
                images_BHWC = reader.read(chunk.start, chunk.stop)
                if chunk.of == "paired":
                    assert reference is not None
                    reference_BHWC = reference.read(chunk.start, chunk.stop)
                    yield chunk, paired_values(images_BHWC, reference_BHWC, self.paired, perceptual)
                else:
                    assert network is not None
                    layers = network.features(images_BHWC)
                    for file in self.files[chunk.of]:
                        file.write(chunk.start, layers[file.layer])
                    yield chunk, {}


def paired_values(
    images_BHWC: NDArray[np.uint8],
    reference_BHWC: NDArray[np.uint8],
    metrics: Set[str],
    perceptual: Perceptual | None,
) -> dict[str, NDArray[np.float64]]:
    """Compute values per image of uint8 pairs, float64 [B], a few images at a time.

    Returns:
        The means ``squared_error`` and ``energy`` over the image. ``ssim`` is there if it is among the metrics, and
            ``lpips`` if there is a network for it.
    """
    step = max(1, _PAIRED_VALUES // int(np.prod(images_BHWC.shape[1:])))
    found: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, len(images_BHWC), step):
        x, y = (unit_images(images[start : start + step]) for images in (images_BHWC, reference_BHWC))
        values = {
            "squared_error": squared_error(x, y),
            "energy": y.square().flatten(1).mean(1),
        }
        if "ssim" in metrics:
            values["ssim"] = ssim(x, y)
        if perceptual is not None:
            values["lpips"] = perceptual.distance(x, y)
        for name, value in values.items():
            found.setdefault(name, []).append(value.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class FrechetResamples:
    """A function that computes Frechet distances between resamples of two sets.

    Every process calls it with its (metric, resample) pairs. Pairs of images are drawn together. ``sides`` holds the
    features of OUT and REF for each metric. A reference that is a Gaussian is not resampled.
    """

    sides: Mapping[str, tuple[FeatureFile, FeatureFile | Gaussian]]
    paired: bool
    seed: int

    def __call__(self, share: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, float]]:
        for metric, resample in share:
            out, reference = self.sides[metric]
            exact = reference if isinstance(reference, Gaussian) else self._drawn(reference, resample, not self.paired)
            yield metric, resample, frechet_distance(self._drawn(out, resample, False), exact)

    def _drawn(self, features: FeatureFile, resample: int, apart: bool) -> Gaussian:
        features_NF = features.read()
        return Gaussian.fit(features_NF, draws(len(features_NF), resample, self.seed, int(apart)))

"""The request of an evaluation, with all checks that are possible before images are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeca_dist.errors import UserError
from moeca_dist.evaluation.distribution import NEIGHBOURS
from moeca_dist.evaluation.image_sets import ImageSet, find_images
from moeca_dist.evaluation.metric_names import DISTRIBUTION, PAIRED

LEAST_IMAGES = {"frechet": 2, "sfid": 2, "inception_score": 2, "precision_recall": NEIGHBOURS + 1}
# What stands in for the reference's images in files that keep statistics: names of mean and covariance.
STATISTICS = {"frechet": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    - ``features``: ``digits`` or an Inception file.
    - ``metrics``: names out of ``PAIRED`` and ``DISTRIBUTION``. None stands for all that can be measured.
    - ``resamples``: resamples of the bootstrap, 0 for no intervals.
    """

    out: Path
    reference: Path
    unpaired: bool = False
    features: str | None = None
    lpips: str | None = None
    metrics: tuple[str, ...] | None = None
    resamples: int = 200
    seed: int = 0
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Plan:
    """Sets that fit together, the metrics to measure, and remarks for the reader."""

    settings: Settings
    out: ImageSet
    reference: ImageSet
    metrics: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def paired(self) -> bool:
        return not self.settings.unpaired

    def from_statistics(self, metric: str) -> bool:
        """Return whether the reference's side of a distance comes from a file instead of from images."""
        # ADM's files keep the statistics of the whole data set beside a few of its images.
        return set(STATISTICS.get(metric, ("",))) <= self.reference.statistics


def make_plan(settings: Settings) -> Plan:
    """Check the settings and return the plan.

    Raises UserError for options that contradict each other, and for sets that cannot be compared as asked.
    """
    _check_options(settings)
    out, reference = find_images(settings.out), find_images(settings.reference)
    if out.shape_HWC is None:
        raise UserError(f"{settings.out} holds statistics, not images: give it as --reference")
    if reference.shape_HWC is not None and reference.shape_HWC != out.shape_HWC:
        raise UserError(
            f"the images differ in size: {out.describe()}, {reference.describe()}; resize the reference, or "
            "generate at its size"
        )
    notes = [] if settings.unpaired else _check_pairs(out, reference)
    metrics, left_out = _measurable(settings, reference)
    _check_counts(metrics, out, reference)
    return Plan(settings, out, reference, metrics, (*notes, *left_out))


def _check_options(settings: Settings) -> None:
    chosen = settings.metrics
    if settings.unpaired and settings.features is None:
        raise UserError("--unpaired leaves only distribution metrics: add --features digits or an Inception file")
    if settings.unpaired and settings.lpips is not None:
        raise UserError("--lpips compares pairs: leave it or --unpaired away")
    if settings.device != "cpu" and not (settings.features or settings.lpips):
        raise UserError("--device has no effect without a network: add --features or --lpips, or leave it away")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device on this machine: choose --device cpu")
    if chosen is None:
        return
    for metric in chosen:
        if metric in PAIRED and settings.unpaired:
            raise UserError(f"{metric} compares pairs: leave it or --unpaired away")
        if metric in DISTRIBUTION and settings.features is None:
            raise UserError(f"{metric} needs a feature network: add --features digits or an Inception file")
    if "lpips" in chosen and settings.lpips is None:
        raise UserError("lpips needs weights: add --lpips FILE")
    if settings.lpips is not None and "lpips" not in chosen:
        raise UserError("--lpips has no effect on these --metrics: add lpips, or leave it away")
    if settings.features is not None and not set(chosen) & set(DISTRIBUTION):
        raise UserError("--features has no effect on these --metrics: add one of " + ", ".join(DISTRIBUTION))


def _check_pairs(out: ImageSet, reference: ImageSet) -> list[str]:
    hint = "generate the reference with the same --seed, --labels and --num-images, or compare with --unpaired"
    if reference.shape_HWC is None:
        raise UserError(f"{reference.path} holds statistics, which have no pairs: add --unpaired")
    if out.num_images != reference.num_images:
        raise UserError(f"{out.num_images:,} images have {reference.num_images:,} references: {hint}")
    if out.names is not None and reference.names is not None and out.names != reference.names:
        stems = [tuple(name.rpartition(".")[0] for name in names) for names in (out.names, reference.names)]
        lone = sorted(set(stems[0]) ^ set(stems[1]))
        if lone:
            raise UserError(f"{lone[0]} is a picture in only one of {out.path} and {reference.path}: {hint}")
    if out.requests is None or reference.requests is None:
        bare = out if out.requests is None else reference
        return [f"seeds and labels were not compared: none are recorded with {bare.path}"]
    ours, theirs = out.requests, reference.requests
    if ours.get("seeds") != theirs.get("seeds"):
        raise UserError(f"the images are of seed {_seeds(ours)}, their references of seed {_seeds(theirs)}: {hint}")
    if ours != theirs:
        raise UserError(f"the images and their references differ in labels or order: {hint}")
    return []


def _seeds(requests: Mapping[str, Any]) -> str:
    seeds = requests.get("seeds")
    return ", ".join(map(str, seeds)) if isinstance(seeds, list) else "?"


def _measurable(settings: Settings, reference: ImageSet) -> tuple[tuple[str, ...], list[str]]:
    """The metrics to measure, and why others that nobody asked for by name are not."""
    wanted = settings.metrics
    if wanted is None:
        wanted = () if settings.unpaired else tuple(name for name in PAIRED if name != "lpips" or settings.lpips)
        wanted += DISTRIBUTION if settings.features else ()
    metrics, notes = [], []
    for metric in wanted:
        missing = _missing(metric, reference)
        if missing is None:
            metrics.append(metric)
        elif settings.metrics is not None:
            raise UserError(f"{metric} needs {missing}: leave it out of --metrics, or give another reference")
        else:
            notes.append(f"{metric} is not measured: it needs {missing}")
    return tuple(metrics), notes


def _missing(metric: str, reference: ImageSet) -> str | None:
    """What a reference without images lacks."""
    if reference.shape_HWC is not None or metric == "inception_score":
        return None
    if metric in STATISTICS:
        names = STATISTICS[metric]
        return None if set(names) <= reference.statistics else f"{names[0]} and {names[1]} in {reference.path}"
    return f"the images of {reference.path}, which holds statistics alone"


def _check_counts(metrics: tuple[str, ...], out: ImageSet, reference: ImageSet) -> None:
    for metric in metrics:
        least = LEAST_IMAGES.get(metric, 1)
        for images in (out, reference) if metric != "inception_score" else (out,):
            if images.shape_HWC is not None and images.num_images < least:
                raise UserError(
                    f"{metric} needs at least {least} images, {images.path} has {images.num_images}: generate more, or "
                    "leave it out of --metrics"
                )

"""Evaluation of a set of images against another: ``evaluate`` is the library's entry, ``moeca evaluate`` the command.

Shape suffixes: N images, M references, F features, K classes.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from moeca_dist.errors import UserError
from moeca_dist.evaluation import intervals
from moeca_dist.evaluation.distribution import (
    Gaussian,
    frechet_distance,
    inception_score,
    inside,
    negative_entropy,
    radii,
)
from moeca_dist.evaluation.features import POOLED, PROBABILITIES, SPATIAL, open_network
from moeca_dist.evaluation.image_sets import read_statistics
from moeca_dist.evaluation.lpips import Perceptual
from moeca_dist.evaluation.metric_names import DISTRIBUTION
from moeca_dist.evaluation.paired import psnr_db
from moeca_dist.evaluation.passes import Chunk, FeatureFile, FrechetResamples, Measure, Pass, chunks
from moeca_dist.evaluation.processes import in_processes
from moeca_dist.evaluation.request import STATISTICS, Plan, Settings, make_plan
from moeca_dist.evaluation.result import Evaluation, Figure

# Layers of the feature network that each metric reads, of OUT and of REF.
_LAYERS = {
    "frechet": (POOLED, POOLED),
    "sfid": (SPATIAL, SPATIAL),
    "inception_score": (PROBABILITIES, None),
    "precision_recall": (POOLED, POOLED),
}
Values = dict[str, NDArray[np.float64]]


def evaluate(settings: Settings, *, progress: bool = False) -> Evaluation:
    """Compute all figures that ``settings`` ask for. They do not depend on the number of workers.

    Images are read a few at a time. Features wait in temporary files (4 bytes per value: 20 KB per image and set with
    the Inception network).

    Raises UserError, before images are read, for a request that cannot be measured.
    """
    plan = make_plan(settings)
    if settings.lpips is not None:
        assert plan.out.shape_HWC is not None
        Perceptual(settings.lpips, settings.device).check_size(plan.out.shape_HWC)
    with tempfile.TemporaryDirectory(prefix="moeca-evaluate-") as folder:
        files = _create_files(plan, Path(folder))
        values = _measure(plan, files, progress)
        figures = _paired_figures(plan, values) if values else {}
        figures |= _distribution_figures(plan, files, progress)
    return Evaluation(plan, figures)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _create_files(plan: Plan, folder: Path) -> dict[Pass, tuple[FeatureFile, ...]]:
    """Empty feature files; the network is opened once here, so that a wrong one is told before anything is read."""
    wanted = [metric for metric in plan.metrics if metric in DISTRIBUTION]
    if not wanted:
        return {}
    assert plan.settings.features is not None and plan.out.shape_HWC is not None
    widths = open_network(plan.settings.features, plan.settings.device, plan.out.shape_HWC).widths
    of_out = {_LAYERS[metric][0] for metric in wanted}
    of_reference = {_LAYERS[metric][1] for metric in wanted if not plan.from_statistics(metric)} - {None}
    files: dict[Pass, tuple[FeatureFile, ...]] = {
        "out": tuple(FeatureFile(folder / f"out_{layer}.npy", layer) for layer in of_out),
        "reference": tuple(FeatureFile(folder / f"reference_{layer}.npy", layer) for layer in of_reference if layer),
    }
    for of, images in zip(files, (plan.out, plan.reference), strict=True):
        for file in files[of]:
            file.create(images.num_images, widths[file.layer])
    return files


def _measure(plan: Plan, files: dict[Pass, tuple[FeatureFile, ...]], progress: bool) -> Values:
    """One pass over each set for its features, and one over the pairs; returns the values per pair."""
    work: list[Chunk] = []
    paired = frozenset(plan.metrics) - set(DISTRIBUTION)
    work += chunks("paired", plan.out) if paired else []
    work += chunks("out", plan.out) if files.get("out") else []
    work += chunks("reference", plan.reference) if files.get("reference") else []
    settings = plan.settings
    measure = Measure(plan.out, plan.reference, paired, settings.lpips, settings.features, files, settings.device)
    values: Values = {}
    total = sum(chunk.stop - chunk.start for chunk in work)
    with tqdm(total=total, desc="measuring", unit="image", disable=not progress) as bar:
        for chunk, found in in_processes(measure, work, settings.workers):
            for name, value_B in found.items():
                if name not in values:
                    values[name] = np.empty(plan.out.num_images)
                values[name][chunk.start : chunk.stop] = value_B
            bar.update(chunk.stop - chunk.start)
    return values


# ---- paired figures --------------------------------------------------------------------------------------------------


def _paired_figures(plan: Plan, values: Values) -> dict[str, Figure]:
    error_N, energy_N = values["squared_error"], values["energy"]
    figures = {}

    def add(name: str, statistic: intervals.Statistic, *values_N: NDArray[np.float64]) -> None:
        interval = intervals.percentile_interval(
            values_N, statistic, resamples=plan.settings.resamples, seed=plan.settings.seed
        )
        figures[name] = Figure(float(statistic(*values_N, axis=-1)), interval)

    if "psnr" in plan.metrics:
        add("psnr_db", _mean, _psnr_db(error_N))
        add("pooled_psnr_db", _pooled_psnr_db, error_N)
    if "ssim" in plan.metrics:
        add("ssim", _mean, values["ssim"])
    if "rel_l2" in plan.metrics:
        add("rel_l2", _rel_l2, error_N, energy_N)
    if "lpips" in plan.metrics:
        add("lpips", _mean, values["lpips"])
    return figures


def _mean(values_N: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(values_N.mean(axis))


def _psnr_db(squared_error: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(psnr_db(torch.as_tensor(squared_error)))


def _pooled_psnr_db(error_N: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return _psnr_db(_mean(error_N, axis))


def _rel_l2(error_N: NDArray[np.float64], energy_N: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Norm of all differences over norm of all references: nought without a difference, infinite to black ones."""
    error, energy = _mean(error_N, axis), _mean(energy_N, axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(np.where(error == 0, 0.0, error / energy))


# ---- distribution figures --------------------------------------------------------------------------------------------


def _distribution_figures(plan: Plan, files: dict[Pass, tuple[FeatureFile, ...]], progress: bool) -> dict[str, Figure]:
    by_layer = {(of, file.layer): file for of, of_files in files.items() for file in of_files}
    figures = _frechet(plan, by_layer, progress)
    if "inception_score" in plan.metrics:
        figures["inception_score"] = _inception_score(plan, by_layer["out", PROBABILITIES].read())
    if "precision_recall" in plan.metrics:
        figures |= _precision_recall(plan, by_layer["out", POOLED].read(), by_layer["reference", POOLED].read())
    return figures


def _frechet(plan: Plan, by_layer: dict[tuple[Pass, str], FeatureFile], progress: bool) -> dict[str, Figure]:
    """The distances of pooled and spatial features; their resamples are the long part, and share the processes."""
    sides: dict[str, tuple[FeatureFile, FeatureFile | Gaussian]] = {
        metric: (by_layer["out", _LAYERS[metric][0]], _reference(plan, metric, by_layer))
        for metric in ("frechet", "sfid")
        if metric in plan.metrics
    }
    values = {metric: _frechet_value(plan, *side) for metric, side in sides.items()}
    found = {metric: [0.0] * plan.settings.resamples for metric in sides}
    work = [(metric, resample) for metric in sides for resample in range(plan.settings.resamples)]
    resamples = FrechetResamples(sides, plan.paired, plan.settings.seed)
    with tqdm(total=len(work), desc="Frechet resamples", disable=not (progress and work)) as bar:
        for metric, resample, distance in in_processes(resamples, work, plan.settings.workers):
            found[metric][resample] = distance
            bar.update()
    return {
        metric: Figure(value, intervals.standard_error_interval(value, found[metric], floor=0.0))
        for metric, value in values.items()
    }


def _frechet_value(plan: Plan, out: FeatureFile, reference: FeatureFile | Gaussian) -> float:
    fitted = Gaussian.fit(out.read())
    exact = reference if isinstance(reference, Gaussian) else Gaussian.fit(reference.read())
    if len(exact.mean_F) != len(fitted.mean_F):
        raise UserError(
            f"{plan.reference.path} keeps statistics of {len(exact.mean_F)} features, {plan.settings.features} has "
            f"{len(fitted.mean_F)}: they are of another network"
        )
    return frechet_distance(fitted, exact)


def _reference(plan: Plan, metric: str, by_layer: dict[tuple[Pass, str], FeatureFile]) -> FeatureFile | Gaussian:
    if plan.from_statistics(metric):
        return Gaussian.from_covariance(*read_statistics(plan.reference, *STATISTICS[metric]))
    return by_layer["reference", _LAYERS[metric][0]]


def _inception_score(plan: Plan, probabilities_NK: NDArray[np.float32]) -> Figure:
    certainty_N = negative_entropy(probabilities_NK)
    found = [
        inception_score(probabilities_NK, intervals.draws(len(certainty_N), resample, plan.settings.seed), certainty_N)
        for resample in range(plan.settings.resamples)
    ]
    value = inception_score(probabilities_NK, certainty_N=certainty_N)
    return Figure(value, intervals.standard_error_interval(value, found, floor=1.0))


def _precision_recall(plan: Plan, out_NF: NDArray[np.float32], reference_MF: NDArray[np.float32]) -> dict[str, Figure]:
    workers = plan.settings.workers
    in_reference_N = inside(out_NF, reference_MF, radii(reference_MF, workers=workers), workers=workers)
    in_out_M = inside(reference_MF, out_NF, radii(out_NF, workers=workers), workers=workers)
    figures = {}
    for name, is_inside in (("precision", in_reference_N), ("recall", in_out_M)):
        # The manifold stays: in a resample of it images would be their own neighbours.
        interval = intervals.percentile_interval(
            [is_inside.astype(np.float64)], _mean, resamples=plan.settings.resamples, seed=plan.settings.seed
        )
        figures[name] = Figure(float(is_inside.mean()), interval)
    return figures

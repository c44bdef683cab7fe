"""Figures over the repeats of a cell: medians with their spread, ratios of neighbours in time, distances of samples."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray


def spread(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {"median": median(found), "low": min(found), "high": max(found)}


def of_cell(records: Sequence[Mapping[str, Any]], cell: str) -> list[Mapping[str, Any]]:
    """The records of one cell, by repeat."""
    return sorted((record for record in records if record["cell"] == cell), key=lambda record: record["repeat"])


def denoise_seconds(records: Sequence[Mapping[str, Any]], cell: str) -> list[float]:
    return [record["report"]["denoise_s"] for record in of_cell(records, cell)]


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times longer the first took, repeat by repeat: both ran within the same round."""
    return spread(a / b for a, b in zip(slow, fast, strict=True))


def mean_seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where the time went, by section: the mean of the ranks, averaged over the repeats."""
    parts = [record["report"]["seconds"]["mean"] for record in records]
    return {name: mean(part[name] for part in parts) for name in parts[0]}


def relative_l2(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """|found - expected| / |expected|, over all samples together."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def psnr_db(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """Of all samples together; the peak is the range of ``expected``, as latents have no fixed one. At most 200."""
    wanted = expected.astype(np.float64)
    error = float(np.sqrt(np.mean((found.astype(np.float64) - wanted) ** 2)))
    return min(200.0, 20 * math.log10(float(np.ptp(wanted)) / error)) if error else 200.0


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """``1.23 [1.20-1.31]``"""
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}-{values['high']:.{digits}f}]"

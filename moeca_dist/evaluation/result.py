"""The figures of an evaluation: a table for people and ``evaluation.json``."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeca_dist.errors import UserError
from moeca_dist.evaluation.intervals import CONFIDENCE, Interval
from moeca_dist.evaluation.request import Plan
from moeca_dist.version import __version__


@dataclass(frozen=True)
class Figure:
    """A value with its interval. ``interval`` is None with too few images, or without resamples."""

    value: float
    interval: Interval | None


# How a figure is called, written, and which way is better.
_SHOWN = {
    "psnr_db": ("PSNR, mean over images, dB", ".2f", "higher"),
    "pooled_psnr_db": ("PSNR of the mean squared error, dB", ".2f", "higher"),
    "ssim": ("SSIM", ".4f", "higher"),
    "rel_l2": ("relative L2", ".4f", "lower"),
    "lpips": ("LPIPS", ".4f", "lower"),
    "frechet": ("Frechet distance", ".4g", "lower"),
    "sfid": ("sFID", ".4g", "lower"),
    "inception_score": ("Inception Score", ".3f", "higher"),
    "precision": ("precision", ".3f", "higher"),
    "recall": ("recall", ".3f", "higher"),
}


@dataclass(frozen=True)
class Evaluation:
    """The plan of an evaluation and its figures."""

    plan: Plan
    figures: Mapping[str, Figure]

    def table(self) -> str:
        """Return a table for people: one line per figure, with its 95% interval."""
        plan = self.plan
        lines = [f"images     {plan.out.describe()}", f"reference  {plan.reference.describe()}"]
        if plan.settings.features is not None:
            lines.append(f"features   {plan.settings.features}")
        rows = [("", "figure", f"{CONFIDENCE:.0%} interval", "better")]
        for name, figure in self.figures.items():
            label, form, better = _SHOWN[name]
            rows.append((label, *_cells(figure, form), better))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines.append("")
        lines += [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in rows
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``evaluation.json``. Infinite figures are null, because JSON has no infinity."""
        plan, settings = self.plan, self.plan.settings
        return {
            "version": __version__,
            "images": {"path": str(plan.out.path), "count": plan.out.num_images, "shape": plan.out.shape_HWC},
            "reference": {
                "path": str(plan.reference.path),
                "count": plan.reference.num_images,
                "statistics": sorted(plan.reference.statistics),
            },
            "paired": plan.paired,
            "features": settings.features,
            "lpips": settings.lpips,
            "bootstrap": {"resamples": settings.resamples, "seed": settings.seed, "confidence": CONFIDENCE},
            "figures": {name: _entry(figure) for name, figure in self.figures.items()},
            "notes": list(plan.notes),
        }

    def write(self, path: Path) -> None:
        """Replace ``path`` as a whole. Raises UserError if it cannot be written."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
                partial.write(text)
            os.replace(partial.name, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place with --out") from None


def _cells(figure: Figure, form: str) -> tuple[str, str]:
    interval = figure.interval
    return f"{figure.value:{form}}", "-" if interval is None else f"[{interval.low:{form}}, {interval.high:{form}}]"


def _entry(figure: Figure) -> dict[str, float | None]:
    interval = figure.interval
    bounds = (None, None) if interval is None else (interval.low, interval.high)
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in zip(("value", "low", "high"), (figure.value, *bounds), strict=True)
    }

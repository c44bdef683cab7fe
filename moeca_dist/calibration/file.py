"""The calibration file: weights of ``calibration/correction.py`` with what they were fitted for.

Weights fit one network, one policy with one schedule, one number of steps and one guidance scale. The file says so, and
a run that differs is refused: corrections fitted for other errors add their own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeca_dist.cache.policy import Half, Policy
from moeca_dist.calibration.correction import OutputWeights, num_terms
from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.types import StepContext

if TYPE_CHECKING:
    from moeca_dist.models.backbone import DiffusionTransformer

FORMAT = 1
# Rounding to another dtype changes the norms by far less, another training by far more.
NORM_TOLERANCE = 1e-3
# Options of the cache section that change what is computed where, or how full steps are named, but nothing that weights
# are fitted to.
_WITHOUT_EFFECT_ON_VALUES = frozenset({"calibration", "location", "memory_limit", "interval", "full_steps"})


@dataclass(frozen=True)
class FittedFor:
    """What the weights depend on. ``cache``: the cache section without what changes no value; ``norms``: of weights."""

    cache: dict[str, Any]
    num_steps: int
    cfg_scale: float
    norms: tuple[float, ...]

    def difference(self, other: "FittedFor") -> str | None:
        """The first thing in which two differ, in words; None where the same weights serve both."""
        if len(self.norms) != len(other.norms) or not all(
            math.isclose(mine, theirs, rel_tol=NORM_TOLERANCE)
            for mine, theirs in zip(self.norms, other.norms, strict=True)
        ):
            return "other network weights"
        for name in ("num_steps", "cfg_scale"):
            if getattr(self, name) != getattr(other, name):
                return f"sampling.{name} {getattr(self, name)}, not {getattr(other, name)}"
        for key in sorted(self.cache.keys() | other.cache.keys()):
            if self.cache.get(key) != other.cache.get(key):
                return f"cache.{key} {self.cache.get(key)}, not {other.cache.get(key)}"
        return None


@dataclass(frozen=True)
class Calibration:
    """Output weights. ``fitted_on``: images and seed, and what was measured on others; for people."""

    fitted_for: FittedFor
    weights: OutputWeights
    fitted_on: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n"


_FIELDS = {"format", *(field.name for field in fields(Calibration))}


def fitted_for(
    config: Config, num_steps: int, policy: Policy | None, halves: Sequence[Half], model: "DiffusionTransformer"
) -> FittedFor:
    """What weights that are calibrated for a run depend on."""
    # Defaults are left out, so that a calibration outlives options that it knows nothing of.
    options = config.cache.model_dump(mode="json", exclude_defaults=True)
    cache = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT_ON_VALUES}
    if policy is not None:
        steps = [StepContext(index, num_steps, 0.0) for index in range(num_steps)]
        cache["full_steps"] = {half: [step.index for step in steps if policy.is_full(step, half)] for half in halves}
    return FittedFor(cache, num_steps, config.sampling.cfg_scale, weight_norms(model))


def weight_norms(model: "DiffusionTransformer") -> tuple[float, ...]:
    """Root mean squares of parameters that every rank holds, whatever experts it has."""
    held = (model.x_embedder.proj.weight, model.final_layer.linear.weight, model.y_embedder.embedding_table.weight)
    return tuple(float(parameter.detach().float().square().mean().sqrt()) for parameter in held)


def check_fits(calibration: Calibration, wanted: FittedFor, path: Path | None) -> None:
    """Raise UserError if the calibration was fitted for something else; ``path``: its file, if there is one."""
    difference = calibration.fitted_for.difference(wanted)
    if difference is not None:
        name = "the calibration" if path is None else f"cache.calibration {path}"
        raise UserError(f"{name} was fitted for {difference}: fit it anew with moeca calibrate")


def read_calibration(path: Path) -> Calibration:
    """Raises UserError for a file that is missing, no calibration, or damaged."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cache.calibration {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cache.calibration {path} is not JSON: write it with moeca calibrate") from None
    return _parsed(tree, path)


def _parsed(tree: Any, path: Path) -> Calibration:
    damaged = UserError(f"cache.calibration {path} is no calibration of format {FORMAT}: write it with moeca calibrate")
    if not isinstance(tree, Mapping) or tree.get("format") != FORMAT:
        raise damaged
    if unknown := tree.keys() - _FIELDS:
        raise UserError(
            f"cache.calibration {path} has a field {min(unknown)}, which nothing reads: remove it, or write the file "
            "anew with moeca calibrate"
        )
    try:
        fitted_for = FittedFor(**tree["fitted_for"] | {"norms": tuple(tree["fitted_for"]["norms"])})
        steps = tuple(tuple(float(weight) for weight in row) for row in tree["weights"]["steps"])
        weights = OutputWeights(int(tree["weights"]["history"]), steps)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged from None
    terms = num_terms(1 if fitted_for.cfg_scale == 1 else 2, weights.history)
    whole = len(steps) == fitted_for.num_steps and all(len(row) == terms for row in steps)
    if not whole or not torch.isfinite(torch.tensor(steps)).all():
        raise damaged
    return Calibration(fitted_for, weights, dict(tree.get("fitted_on", {})))

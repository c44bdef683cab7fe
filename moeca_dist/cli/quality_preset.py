"""The options ``--quality`` and ``--target-psnr``: they name a tuned file, or a calibration at the start of the run."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeca_dist.cli.arguments import Parser, decibels
from moeca_dist.config import QUALITY_NAMES, Config, QualityName, load_config
from moeca_dist.errors import UserError

if TYPE_CHECKING:
    from moeca_dist.runtime.engine import Engine


@dataclass(frozen=True)
class QualityPreset:
    """The requested quality. ``automatic`` is True if no tuned file has it."""

    quality: QualityName | None
    target_psnr_db: float | None
    automatic: bool

    def apply(self, engine: "Engine") -> "Engine":
        """Return the engine to generate with. A collective of the world if the preset is automatic."""
        if not self.automatic:
            return engine
        from moeca_dist.tuning.automatic import automatic

        return automatic(engine, self.quality, self.target_psnr_db)


def add_quality_arguments(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quality", choices=QUALITY_NAMES, help="the tuned cache of that name; calibrated first where there is none"
    )
    group.add_argument(
        "--target-psnr", type=decibels, metavar="DB",
        help="the fastest tuned cache that gives so much to 95%% of the images; calibrated first where there is none",
    )  # fmt: skip


def resolve_quality(config: Config, args: argparse.Namespace) -> tuple[Config, QualityPreset]:
    """Return the configuration with the tuned file's cache, and the preset.

    ``config`` is returned as given if the options name no tuned file. Raises UserError for a cache that is set besides,
    and for a target that no tuned file reaches.
    """
    if args.quality is None and args.target_psnr is None:
        return config, QualityPreset(None, None, automatic=False)
    option = "--quality" if args.quality is not None else "--target-psnr"
    if stray := [override for override in args.overrides if override.partition("=")[0].split(".")[0] == "cache"]:
        raise UserError(f"--set {stray[0]} has no effect with {option}, which chooses the cache: keep one of them")
    files: dict[QualityName, Path] = {
        name: path for name in QUALITY_NAMES if (path := getattr(config.quality, name)) is not None
    }
    path = None
    if args.quality is not None:
        path = files.get(args.quality)
    elif files:
        path = _fastest(files, args.target_psnr)
    if path is not None:
        config = config.model_copy(update={"cache": load_config(path).cache})
    return config, QualityPreset(args.quality, args.target_psnr, automatic=path is None)


def _fastest(files: dict[QualityName, Path], target_psnr_db: float) -> Path:
    from moeca_dist.calibration.file import read_calibration

    reached: list[tuple[float, float, QualityName, Path]] = []
    for name, path in files.items():
        calibration = load_config(path).cache.calibration
        measured = {} if calibration is None else read_calibration(calibration).fitted_on.get("after", {})
        if not {"speedup", "bound_db"} <= measured.keys():
            raise UserError(f"{path}: no figures of moeca tune in its calibration: tune it anew")
        reached.append((measured["speedup"], measured["bound_db"], name, path))
    enough = [each for each in reached if each[1] >= target_psnr_db]
    if not enough:
        speedup, bound_db, name, _ = max(reached, key=lambda each: each[1])
        raise UserError(
            f"--target-psnr {target_psnr_db:g}: of the tuned files {name} comes closest, with {bound_db:.1f} dB for "
            f"95% of the images at {speedup:.2f}x fewer FLOPs; tune for it with moeca tune, or use cache.policy=none"
        )
    return max(enough)[3]

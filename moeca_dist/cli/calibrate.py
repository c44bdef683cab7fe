"""The command ``moeca calibrate``: fit the output weights of a cached run."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moeca_dist.cli.arguments import Parser, add_run_arguments
from moeca_dist.cli.generate import launcher_number, tell_deepspeed_the_device
from moeca_dist.config import Config, load_config, validate_world
from moeca_dist.errors import UserError

if TYPE_CHECKING:
    from moeca_dist.calibration.file import Calibration
    from moeca_dist.parallel.mesh import Mesh

HELP = (
    "Fit weights that correct a cached run's outputs, on exact trajectories of a few images, and measure them on "
    "others. Use the file with cache.calibration. Under torchrun or the deepspeed launcher all ranks do it together."
)
DEFAULT_NUM_IMAGES = 40


def add_arguments(parser: Parser) -> None:
    add_run_arguments(
        parser,
        out="JSON",
        out_help="where the calibration goes",
        num_images=DEFAULT_NUM_IMAGES,
        images_help="to fit on, in one batch; as many others are measured; default: %(default)s",
        first_seed=7,
        seed_help="of the images to fit on; default: %(default)s",
        replaced="an earlier calibration",
    )
    parser.set_defaults(command=_calibrate, parser=parser)


def _calibrate(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    validate_world(config, launcher_number("WORLD_SIZE", 1))
    if config.cache.policy == "none":
        raise UserError("cache.policy none has nothing to calibrate: name a policy")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already; choose another --out, or add --overwrite to replace it")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}")
    tell_deepspeed_the_device()
    from moeca_dist.runtime.engine import join

    mesh = join(config)
    try:
        _fit_and_write(config, mesh, args)
    except UserError:
        mesh.close()
        raise
    # Not after other errors: a group that lost a rank could wait for it again.
    mesh.close()


def _fit_and_write(config: Config, mesh: "Mesh", args: argparse.Namespace) -> None:
    from moeca_dist.runtime.engine import Engine
    from moeca_dist.tuning.calibrate import calibrate
    from moeca_dist.types import Request

    engine = Engine.from_config(config, mesh=mesh)
    classes = engine.model.spec.num_classes
    fit_on, held_out = (
        [Request(index, index % classes, number) for index in range(args.num_images)]
        for number in (args.seed, args.seed + 1)
    )
    outcome = calibrate(engine, fit_on, held_out)
    if mesh.rank:
        return
    _write(outcome.calibration, args.out)
    print(
        f"on {args.num_images} images of another seed: {outcome.before} without, {outcome.after} with the calibration"
    )
    print(f"use it with cache.calibration={args.out}")


def _write(calibration: "Calibration", out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    partial.write_text(calibration.to_json())
    os.replace(partial, out)

"""The command ``moeca tune``: choose a cache for a target."""

import argparse
from typing import TYPE_CHECKING

from moeca_dist.cli.arguments import Parser, add_run_arguments, at_least_two, at_least_zero, decibels, ratio
from moeca_dist.cli.generate import launcher_number, tell_deepspeed_the_device
from moeca_dist.config import Config, load_config, validate_world
from moeca_dist.errors import UserError

if TYPE_CHECKING:
    from moeca_dist.parallel.mesh import Mesh
    from moeca_dist.tuning.files import TunedFiles

HELP = (
    "Choose policy, forecast order and full steps for a target: by proxy on recorded exact trajectories, confirmed by "
    "real runs, measured on held-out seeds. Run again after an interruption to go on. Under torchrun or the deepspeed "
    "launcher all ranks do it together."
)
DEFAULT_NUM_IMAGES, DEFAULT_SEED, DEFAULT_REFINEMENTS = 40, 7, 40


def add_arguments(parser: Parser) -> None:
    add_run_arguments(
        parser,
        out="YAML",
        out_help="the tuned configuration",
        num_images=DEFAULT_NUM_IMAGES,
        images_help="to fit on, to check the choice and to report it on, each; default: %(default)s",
        images_type=at_least_two,
        first_seed=DEFAULT_SEED,
        seed_help="of the images to fit on; the next two are used too; default: %(default)s",
        replaced="earlier files",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-psnr", type=decibels, metavar="DB", help="the fewest FLOPs with which 95%% of the images have it"
    )
    target.add_argument(
        "--target-speedup", type=ratio, metavar="X", help="the closest images with at least so many times fewer FLOPs"
    )
    parser.add_argument(
        "--refinements", type=at_least_zero, default=DEFAULT_REFINEMENTS, metavar="N",
        help="real runs that move single full steps of the best schedule; default: %(default)s",
    )  # fmt: skip
    parser.set_defaults(command=_tune, parser=parser)


def _tune(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    validate_world(config, launcher_number("WORLD_SIZE", 1))
    tell_deepspeed_the_device()
    from moeca_dist.parallel.agreement import on_all_ranks
    from moeca_dist.runtime.engine import join
    from moeca_dist.runtime.run_plan import RunPlan
    from moeca_dist.tuning.files import TunedFiles

    files = TunedFiles(args.out)
    mesh = join(config)
    try:
        on_all_ranks(mesh, lambda: RunPlan.resolve(config, mesh.world_size))
        on_all_ranks(mesh, lambda: files.check(overwrite=args.overwrite) if mesh.rank == 0 else None)
        _tune_and_write(config, mesh, files, args)
    except UserError:
        mesh.close()
        raise
    # Not after other errors: a group that lost a rank could wait for it again.
    mesh.close()


def _tune_and_write(config: Config, mesh: "Mesh", files: "TunedFiles", args: argparse.Namespace) -> None:
    from moeca_dist.parallel.agreement import on_all_ranks
    from moeca_dist.runtime.engine import Engine
    from moeca_dist.tuning.resume import StateFile
    from moeca_dist.tuning.target import Target
    from moeca_dist.tuning.tune import Settings, check_target, run_identity, tune

    engine = Engine.from_config(config, mesh=mesh)
    target = Target("speedup", args.target_speedup)
    if args.target_psnr is not None:
        target = Target("psnr", args.target_psnr)
    settings = Settings(target, args.num_images, args.seed, args.refinements)
    check_target(engine, target)
    identity = run_identity(engine, settings)
    state = on_all_ranks(mesh, lambda: StateFile(files.state, identity) if mesh.rank == 0 else None)
    try:
        tuned = tune(engine, settings, state, progress=mesh.rank == 0)
        if state is None:
            return
        # The schedule fits one number of steps, but any number of ranks.
        files.write(tuned, engine.config.model_copy(update={"parallel": config.parallel}))
        state.remove()
    finally:
        if state is not None:
            state.close()
    print(f"{tuned.chosen.candidate.policy} of order {tuned.chosen.candidate.order}: ", end="")
    print(f"{tuned.held_out.speedup:.2f}x fewer FLOPs, {tuned.held_out.mean_db:.1f} dB on average on held-out images")
    print(f"configuration: {files.config}\nhow it was chosen: {files.page}")

"""The command ``moeca batch``: many images over gangs of ranks on a Ray cluster."""

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from moeca_dist.cli.arguments import Parser, add_run_arguments, at_least_one, parse_labels, positive_seconds
from moeca_dist.cli.generate import DEFAULT_NUM_IMAGES, tell_deepspeed_the_device
from moeca_dist.config import load_config, validate_world
from moeca_dist.errors import UserError

HELP = "Generate many images on a Ray cluster, over gangs of expert-parallel ranks; survives the loss of any of them."
PLACEMENT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 600.0


def add_arguments(parser: Parser) -> None:
    add_run_arguments(
        parser,
        out="FOLDER",
        out_help="where the results go",
        num_images=None,
        images_help=f"default: {DEFAULT_NUM_IMAGES}",
        first_seed=None,
        seed_help="default: 0",
    )
    parser.add_argument("--gangs", type=at_least_one, default=1, metavar="G", help="default: %(default)s")
    parser.add_argument("--gang-size", type=at_least_one, metavar="P", help="ranks of each gang; default: 1")
    parser.add_argument("--labels", type=parse_labels, metavar="LIST", help="e.g. 0-9, used in turn; default: all")
    parser.add_argument("--jobs", type=Path, metavar="FILE", help=".jsonl or .csv of {label, seed, count}, one a line")
    parser.add_argument("--resume", action="store_true", help="go on with the batch in FOLDER")
    parser.add_argument(
        "--address", default="auto", metavar="auto|local|HOST:PORT", help="the Ray cluster; auto starts one if need be"
    )
    parser.add_argument("--dashboard", action="store_true", help="with a local cluster: start Ray's dashboard too")
    parser.add_argument(
        "--strategy", choices=("STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"), default="STRICT_PACK",
        help="how the ranks of a gang lie on nodes; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--bundles", type=_bundles, metavar="LIST", help="ranks per bundle, each on one node, e.g. 8,8")
    parser.add_argument(
        "--progress-timeout", type=positive_seconds, metavar="S",
        help="a rank without a step for this long hangs; default: parallel.timeout_s",
    )  # fmt: skip
    parser.add_argument(
        "--start-timeout", type=positive_seconds, default=START_TIMEOUT_S, metavar="S",
        help="ranks have to load the model and meet within this time; default: %(default)g",
    )  # fmt: skip
    parser.add_argument(
        "--placement-timeout", type=positive_seconds, default=PLACEMENT_TIMEOUT_S, metavar="S",
        help="how long to wait for nodes where the cluster cannot hold a single gang; default: %(default)g",
    )  # fmt: skip
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for wrong arguments, and the errors of ``ray_batch.start.start_batch``."""
    config = load_config(args.config, args.overrides)
    bundles = _gang_bundles(args)
    validate_world(config, sum(bundles))
    if args.jobs is not None:
        for option in ("num_images", "labels", "seed"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} has no effect with --jobs: remove one of them")
    if args.dashboard and args.address not in ("auto", "local"):
        raise UserError("--dashboard has no effect on a cluster that runs already: remove it")
    tell_deepspeed_the_device()
    from moeca_dist.ray_batch.start import Options, start_batch

    options = Options(
        config=config,
        folder=Path(os.path.abspath(args.out)),
        resume=args.resume,
        jobs=None if args.jobs is None else Path(os.path.abspath(args.jobs)),
        num_images=args.num_images or DEFAULT_NUM_IMAGES,
        labels=args.labels,
        seed=args.seed or 0,
        gangs=args.gangs,
        bundles=bundles,
        strategy=args.strategy,
        address=args.address,
        dashboard=args.dashboard,
        start_timeout_s=args.start_timeout,
        progress_timeout_s=args.progress_timeout or config.parallel.timeout_s,
        placement_timeout_s=args.placement_timeout,
    )
    with _logging():
        report = start_batch(options)
    print(report.summary())
    print(f"\nresults: {options.folder}")


def _gang_bundles(args: argparse.Namespace) -> tuple[int, ...]:
    """Ranks per bundle: those of ``--bundles``, or one each."""
    if args.bundles is None:
        return (1,) * (args.gang_size or 1)
    if args.gang_size is not None and args.gang_size != sum(args.bundles):
        raise UserError(
            f"--bundles {','.join(map(str, args.bundles))} is {sum(args.bundles)} ranks, --gang-size {args.gang_size}: "
            "leave one of them away"
        )
    bundles: tuple[int, ...] = args.bundles
    return bundles


def _bundles(text: str) -> tuple[int, ...]:
    return tuple(at_least_one(part.strip()) for part in text.split(","))


@contextmanager
def _logging() -> Iterator[None]:
    """The package's log on standard error, above the bar rather than through it."""
    logger = logging.getLogger("moeca_dist")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

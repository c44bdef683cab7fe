"""Parsing of the command line: every mistake is a UserError of one line, raised before any work."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moeca_dist.errors import UserError

SEED_LIMIT = 2**32  # what sampling.noise can tell apart


class Parser(argparse.ArgumentParser):
    """A parser that raises mistakes as UserError: one line, and only on rank 0. Options are never abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def dispatch(parser: Parser, argv: Sequence[str] | None) -> None:
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = re.findall(r"--[a-z][a-z-]*", args.parser.format_usage())
        close = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {args.parser.prog} --help"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    args.command(args)


def parse_labels(text: str) -> list[range]:
    """Parse ``0-9`` or ``1,3,7-9`` into ranges in the given order.

    They stay ranges, because their labels are not yet checked.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, flags=re.ASCII)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of labels such as 0-9 or 1,3,7-9")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise argparse.ArgumentTypeError(f"{part.strip()} runs backwards; write {high}-{low}")
        ranges.append(range(low, high + 1))
    return ranges


def at_least_one(text: str) -> int:
    return _integer(text, 1, None)


def at_least_zero(text: str) -> int:
    return _integer(text, 0, None)


def seed(text: str) -> int:
    return _integer(text, 0, SEED_LIMIT - 1)


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _integer(text: str, low: int, high: int | None) -> int:
    wanted = f"an integer in {low}..{high}" if high is not None else f"an integer of at least {low}"
    if (
        not re.fullmatch(r"[-+]?\d+", text, flags=re.ASCII)
        or int(text) < low
        or (high is not None and int(text) > high)
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


def decibels(text: str) -> float:
    return _number(text, 0, "a number of decibels above 0")


def ratio(text: str) -> float:
    return _number(text, 1, "a ratio above 1")


def at_least_two(text: str) -> int:
    number = at_least_one(text)
    if number < 2:
        raise argparse.ArgumentTypeError("one image has no spread: give at least 2")
    return number


def _number(text: str, above: float, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not above < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


def add_run_arguments(
    parser: Parser,
    *,
    out: str,
    out_help: str,
    num_images: int | None,
    first_seed: int | None,
    images_help: str = "default: %(default)s",
    seed_help: str = "default: %(default)s",
    images_type: Callable[[str], int] = at_least_one,
    replaced: str | None = None,
) -> None:
    """Add the options of every command that generates images.

    Args:
        out: the metavar of ``--out``, e.g. FOLDER.
        num_images: the default of ``--num-images``. None if the command has to know whether it was given.
        first_seed: the default of ``--seed``. None if the command has to know whether it was given.
        images_type: the parser of ``--num-images``.
        replaced: the results that ``--overwrite`` replaces. None for a command without ranks from a launcher, which
            goes on with earlier results.
    """
    parser.add_argument("--config", type=Path, required=True, metavar="YAML")
    parser.add_argument("--out", type=Path, required=True, metavar=out, help=out_help)
    parser.add_argument("--num-images", type=images_type, default=num_images, metavar="N", help=images_help)
    parser.add_argument("--seed", type=seed, default=first_seed, help=seed_help)
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a config key"
    )
    if replaced is not None:
        parser.add_argument("--overwrite", action="store_true", help=f"replace {replaced}")
        # The deepspeed launcher adds it to every command line; the environment it sets too says the same.
        parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

"""The command line: parse, check, build, run, and turn every outcome into an exit code.

Importing this package imports only the standard library and the configuration. torch and deepspeed take seconds to
import, and ``--help`` or a mistyped key must not wait for them.
"""

from collections.abc import Sequence

from moeca_dist.cli import batch, calibrate, convert, evaluate, generate, place, report, trace, tune
from moeca_dist.cli.arguments import Parser, dispatch
from moeca_dist.cli.exit_codes import exit_code
from moeca_dist.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``moeca`` console command and return the exit code."""
    parser = Parser(prog="moeca", description="Distributed inference for diffusion transformers with MoE.")
    parser.add_argument("--version", action="version", version=f"moeca {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_arguments(commands.add_parser("generate", help="generate images", description=generate.HELP))
    batch.add_arguments(commands.add_parser("batch", help="generate many images on Ray", description=batch.HELP))
    convert.add_arguments(commands.add_parser("convert", help="rewrite a checkpoint", description=convert.HELP))
    calibrate.add_arguments(commands.add_parser("calibrate", help="correct a cache", description=calibrate.HELP))
    tune.add_arguments(commands.add_parser("tune", help="choose a cache for a target", description=tune.HELP))
    trace.add_arguments(commands.add_parser("trace", help="record a run's routing", description=trace.HELP))
    place.add_arguments(commands.add_parser("place", help="place experts on ranks", description=place.HELP))
    report.add_arguments(commands.add_parser("report", help="show what a run did", description=report.HELP))
    evaluate.add_arguments(commands.add_parser("evaluate", help="measure images", description=evaluate.HELP))
    return exit_code(lambda: dispatch(parser, argv))


def generate_main(argv: Sequence[str] | None = None) -> int:
    """Run ``launch/generate.py``, which is the same as ``moeca generate``."""
    parser = Parser(description=generate.HELP)
    generate.add_arguments(parser)
    return exit_code(lambda: dispatch(parser, argv))


def tune_main(argv: Sequence[str] | None = None) -> int:
    """Run ``launch/tune.py``, which is the same as ``moeca tune``."""
    parser = Parser(description=tune.HELP)
    tune.add_arguments(parser)
    return exit_code(lambda: dispatch(parser, argv))


def batch_main(argv: Sequence[str] | None = None) -> int:
    """Run ``launch/ray_generate.py``, which is the same as ``moeca batch``."""
    parser = Parser(description=batch.HELP)
    batch.add_arguments(parser)
    return exit_code(lambda: dispatch(parser, argv))

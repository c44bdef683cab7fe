"""The command ``moeca report``: show the figures of a run."""

import argparse
from pathlib import Path

from moeca_dist.cli.arguments import Parser

HELP = "Show the figures of a run: compute, branches, exchange and cache, overall and for each MoE block."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that `moeca generate --out` wrote")
    parser.add_argument("--plots", action="store_true", help="draw figures per step and per expert into OUT/plots")
    parser.set_defaults(command=_report, parser=parser)


def _report(args: argparse.Namespace) -> None:
    from moeca_dist.report.tables import read_report, render

    report = read_report(args.out)
    print(render(report))
    if args.plots:
        from moeca_dist.report.plots import write_plots

        print("\n" + "\n".join(f"plot: {path}" for path in write_plots(report, args.out)))

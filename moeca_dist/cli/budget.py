"""``moeca budget``: the rows of exchange mode ``budget``, read off a run that had enough of them."""

import argparse
from pathlib import Path

from moeca_dist.cli.arguments import Parser

HELP = "Print parallel.budget for each MoE block from what a run with parallel.budget 1.0 needed."
QUANTILES = ("0.5", "0.9", "0.99", "0.999", "1")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that `moeca generate --out` wrote")
    parser.add_argument(
        "--quantile",
        choices=QUANTILES,
        default="0.99",
        help="share of the steps, images and groups of experts that shall find enough rows (default: %(default)s)",
    )
    parser.set_defaults(command=_budget, parser=parser)


def _budget(args: argparse.Namespace) -> None:
    from moeca_dist.report.tables import needed_rows, read_report

    rows = needed_rows(read_report(args.out), args.quantile)
    print(f"parallel:\n  exchange: budget\n  budget: [{', '.join(map(str, rows))}]")

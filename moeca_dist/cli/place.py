"""The command ``moeca place``: choose which rank owns which expert, from a routing trace."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moeca_dist.cli.arguments import Parser, at_least_one, at_least_zero
from moeca_dist.errors import UserError

if TYPE_CHECKING:
    from moeca_dist.parallel.expert_placement import PlacementTable
    from moeca_dist.tuning.experts.trace import RoutingTrace

HELP = (
    "Assign experts to ranks from a routing trace (`moeca trace`), so that all ranks compute alike and experts that "
    "are chosen together share a rank. Use the file with parallel.expert_placement."
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("trace", type=Path, metavar="NPZ", help="what `moeca trace` recorded")
    parser.add_argument("--ranks", type=at_least_one, required=True, metavar="P", help="of an expert-parallel group")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="where the table goes")
    parser.add_argument(
        "--balance", type=_share, metavar="SHARE",
        help="1 evens out the ranks' load alone, 0 shortens the exchange alone; default: 0.5",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=at_least_zero, default=0, metavar="N",
        help="experts of each block, those that compute most, that every rank holds: less travels, for more memory",
    )  # fmt: skip
    parser.add_argument("--check", type=Path, metavar="NPZ", help="another trace, to see what the table does to it")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier table")
    parser.set_defaults(command=_place, parser=parser)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _place(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already; choose another --out, or add --overwrite to replace it")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}")
    from moeca_dist.tuning.experts.assign import DEFAULT_BALANCE, assign_experts
    from moeca_dist.tuning.experts.trace import RoutingTrace

    trace = RoutingTrace.read(args.trace)
    other = None if args.check is None else RoutingTrace.read(args.check)
    if other is not None and (other.blocks, other.num_experts) != (trace.blocks, trace.num_experts):
        raise UserError(f"--check {args.check} is of another network than {args.trace}")
    balance = DEFAULT_BALANCE if args.balance is None else args.balance
    table = assign_experts(trace, args.ranks, balance, args.replicas)
    remarks = {"trace": trace.source, "balance": balance, "replicas": args.replicas}
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(table.to_json(remarks))
    os.replace(partial, args.out)
    for name, tried in ((args.trace, trace), (args.check, other)):
        if tried is not None:
            print(f"{name}: {_effect(tried, table, args.ranks)}")
    if args.replicas:
        placements = table.by_block.values()
        most = max(len(placement.experts_of(rank)) for placement in placements for rank in range(args.ranks))
        equal = -(-trace.num_experts // args.ranks)
        print(f"a rank holds up to {most} of the {trace.num_experts} experts of a block, {equal} without replicas")
    print(f"use it with parallel.expert_placement={args.out}")


def _effect(trace: "RoutingTrace", table: "PlacementTable", num_ranks: int) -> str:
    from moeca_dist.parallel.expert_placement import PlacementTable
    from moeca_dist.tuning.experts.assign import placement_effect

    equal = placement_effect(trace, PlacementTable.contiguous(trace.blocks, trace.num_experts, num_ranks), num_ranks)
    placed = placement_effect(trace, table, num_ranks)
    if not equal.bytes_per_step:
        return "one rank, nothing travels"
    return (
        f"{placed.bytes_per_step / equal.bytes_per_step:.3f} of the bytes of equal runs; busiest rank "
        f"{placed.slowest_load:.2f} times the mean, {equal.slowest_load:.2f} with equal runs"
    )

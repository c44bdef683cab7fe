"""Predicts the time of a denoising step on ranks that nobody has to own, and checks the prediction where it can.

    python -m benchmarks.simulator.simulate --measure --configs bench-dsmoe-s-e48       # a table of this machine
    python -m benchmarks.simulator.simulate --validate NETWORK/data.json          # against scaling/network.py
    python -m benchmarks.simulator.simulate --predict --configs bench-dsmoe-s-e48 --ranks 2 4 --rates 1000 200 50

``--measure`` times single ranks, the routed experts and the exchange on this machine and records the routing of the
policies: everything the simulator needs, kept in one folder. ``--validate`` predicts every cell of a measured sweep
over limited networks and writes the table of errors. ``plan.py`` predicts what clusters of GPUs should do.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.common.hardware import REPOSITORY, conditions
from benchmarks.common.machine_speed import times
from benchmarks.common.results import OUT_HELP, default_folder, save
from benchmarks.scaling.netns import Link
from benchmarks.scaling.rank_cases import AT_OWNERS, BRANCHES, CELLS, CODED, DEFAULT, ON_ONE_RANK, UNCACHED, config_path
from benchmarks.simulator.cpu import CpuMachine, available_cores
from benchmarks.simulator.measure import measure, record
from benchmarks.simulator.report import validation_markdown
from benchmarks.simulator.step import StepTime, simulate_step, traffic_of_steps
from moeca_dist.errors import UserError
from moeca_dist.moe.value_location import Location
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.tuning.experts.traffic import RowBytes

TABLES = REPOSITORY / "benchmarks/simulator/tables"
DEFAULT_POLICIES = (UNCACHED, DEFAULT, BRANCHES)
DEFAULT_NUM_IMAGES = {"demo": 40}
TARGET = 0.15


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        torch.set_num_threads(1)
        if args.measure:
            make_tables(args)
        elif args.validate:
            return validate(args)
        else:
            predict(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", action="store_true", help="make the tables of this machine")
    what.add_argument("--validate", type=Path, nargs="+", metavar="JSON", help="data.json of network.py")
    what.add_argument("--predict", action="store_true", help="print the time of a step for each cell")
    parser.add_argument("--configs", nargs="+", default=["bench-dsmoe-s-e48"], help="default: %(default)s")
    parser.add_argument("--policies", nargs="+", choices=[cell.name for cell in CELLS], default=DEFAULT_POLICIES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--rates", type=float, nargs="*", default=[1000, 200, 50], help="Mbit/s; default: 1000 200 50")
    parser.add_argument("--num-images", type=int, help="of all ranks together (default: 4, demo 40)")
    parser.add_argument("--repeats", type=int, default=2, help="of --measure; default: %(default)s")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables; default: %(default)s")
    parser.add_argument("--cores", type=float, help="that the ranks share (default: all of this machine)")
    parser.add_argument(
        "--busy", action="store_true", help="take off the cores that worked for others in each validated cell"
    )
    parser.add_argument("--note", default="", help="a remark on the conditions, kept with the results")
    parser.add_argument("--out", type=Path, default=default_folder("simulate"), help=OUT_HELP)
    return parser.parse_args(argv)


# ---- tables ----------------------------------------------------------------------------------------------------------


def make_tables(args: argparse.Namespace) -> None:
    args.tables.mkdir(parents=True, exist_ok=True)
    for name in args.configs:
        path = config_path(name)
        images = args.num_images or DEFAULT_NUM_IMAGES.get(path.stem, 4)
        for policy in args.policies:
            if policy not in ON_ONE_RANK:
                record(path, policy, images, args.overrides).save(trace_path(args.tables, path.stem, policy))
        table = measure(path, args.policies, images, args.ranks, args.repeats, args.overrides)
        setting = conditions("cpu") | {"overrides": " ".join(args.overrides), "note": args.note}
        out = args.tables / f"{path.stem}.json"
        out.write_text(json.dumps({"conditions": setting, **table}, indent=1) + "\n")
        print(f"wrote {out}")


def trace_path(folder: Path, config: str, policy: str) -> Path:
    return folder / f"{config}_{ON_ONE_RANK.get(policy, policy)}.npz"


def read_table(folder: Path, config: str) -> dict[str, Any]:
    path = folder / f"{config}.json"
    if not path.is_file():
        command = f"python -m benchmarks.simulator.simulate --measure --configs {config}"
        raise UserError(f"{path} is missing: make it with `{command}`")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---- predicting ------------------------------------------------------------------------------------------------------


def predict_run(
    table: Mapping[str, Any],
    trace: RoutingTrace,
    policy: str,
    num_ranks: int,
    cores: float,
    link: Link | None = None,
    probe_mbit: float | None = None,
    placed: PlacementTable | None = None,
) -> list[StepTime]:
    """Every step of a run on CPU ranks; experts in equal runs unless ``placed``."""
    machine = CpuMachine(table, policy, trace, num_ranks, cores, link, probe_mbit)
    placed = placed or PlacementTable.contiguous(trace.blocks, trace.num_experts, num_ranks)
    location: Location = "owner" if policy in AT_OWNERS else "home"
    # The configurations that are simulated on CPU compute in fp32.
    row = RowBytes.int8(trace.row_bytes // torch.float32.itemsize) if policy in CODED else None
    steps = traffic_of_steps(trace, placed, num_ranks, location, row)
    full_S = trace.refreshed_SLHBTK.reshape(trace.num_steps, -1).min(1)
    return [simulate_step(step, layers, machine, full=bool(full_S[step])) for step, layers in enumerate(steps)]


def predict(args: argparse.Namespace) -> None:
    cores = args.cores or available_cores()
    print("| config | policy | ranks | link | ms per step | home | experts | exchange | agree | of it wait |")
    print("|" + "---|" * 10)
    for name in args.configs:
        config = config_path(name).stem
        table = read_table(args.tables, config)
        for policy in args.policies:
            trace = RoutingTrace.read(trace_path(args.tables, config, policy))
            for num_ranks in args.ranks:
                for link in (None, *(Link(rate) for rate in args.rates)):
                    steps = predict_run(table, trace, policy, num_ranks, cores, link)
                    mean = sum(steps, StepTime()) * (1000 / len(steps))
                    parts = (mean.total, mean.home, mean.experts, mean.exchange, mean.agree, mean.wait)
                    rate = "loopback" if link is None else f"{link.rate_mbit:g} Mbit/s"
                    cells = [config, policy, str(num_ranks), rate, *(f"{part:.1f}" for part in parts)]
                    print("| " + " | ".join(cells) + " |")


# ---- validating ------------------------------------------------------------------------------------------------------


def validate(args: argparse.Namespace) -> int:
    """Predict the cells of measured sweeps. 1 where a cell is off by more than the target."""
    rows, sources = [], []
    for path in args.validate:
        if not path.is_file():
            raise UserError(f"{path} does not exist: measure it with benchmarks/scaling/network.py")
        results = json.loads(path.read_text())
        sources.append({"file": os.path.relpath(path, REPOSITORY), **results["conditions"]})
        rows += [compare(row, args) for row in results["rows"] if row["num_ranks"] > 1]
    if not rows:
        raise UserError("the results hold no cell of more than one rank")
    setting = conditions("cpu") | {"note": args.note, "busy": args.busy}
    table = validation_markdown(rows, setting, sources, TARGET)
    save(args.out, {"conditions": setting, "measured": sources, "rows": rows}, table)
    off = [row for row in rows if abs(row["error"]) > TARGET]
    print(f"wrote {args.out}: {len(rows) - len(off)} of {len(rows)} cells within {TARGET:.0%}")
    return 1 if off else 0


def compare(row: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    config, policy, num_ranks = row["config"], row["policy"], row["num_ranks"]
    table = read_table(args.tables, config)
    trace = RoutingTrace.read(trace_path(args.tables, config, policy))
    if (trace.num_images, trace.num_steps) != (row["num_images"], row["num_steps"]):
        raise UserError(
            f"the table of {config} is for {trace.num_images} images in {trace.num_steps} steps, the sweep has "
            f"{row['num_images']} in {row['num_steps']}: measure again with --num-images and --set"
        )
    if row.get("reference_s") is None:
        raise UserError("the sweep does not say how fast the machine was: measure it again, on CPU")
    slowdown = row["reference_s"] / table["reference_s"]
    table |= {name: times(table[name], slowdown) for name in ("compute", "micro")}
    cores = (args.cores or available_cores()) - (row["cores_used_by_others"] if args.busy else 0.0)
    link = None if row["link"] is None else Link(**row["link"])
    probe = None if row["measured_link"] is None else row["measured_link"]["mbit"]
    steps = predict_run(table, trace, policy, num_ranks, max(cores, 0.1), link, probe)
    found = sum(steps, StepTime())
    measured = row["denoise_s"]["median"]
    return {
        "config": config,
        "policy": policy,
        "num_ranks": num_ranks,
        "rate_mbit": None if link is None else link.rate_mbit,
        "measured_s": measured,
        "measured_low_s": row["denoise_s"]["low"],
        "measured_high_s": row["denoise_s"]["high"],
        "predicted_s": found.total,
        "error": found.total / measured - 1,
        "parts": {name: getattr(found, name) for name in ("home", "experts", "exchange", "agree", "wait")},
        "measured_parts": row["seconds"],
        "ms_per_step": 1000 * measured / row["num_steps"],
        "cores_used_by_others": row["cores_used_by_others"],
        "slowdown": slowdown,
    }


if __name__ == "__main__":
    sys.exit(main())

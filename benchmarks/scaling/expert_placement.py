"""What a placement table from `moeca place` saves against equal runs of experts, measured on running ranks.

    python -m benchmarks.scaling.expert_placement --ranks 2 4 --configs demo bench-dsmoe-s-e48

The table is chosen from the routing of some images and measured on others, uncached and with the default policy: bytes
that the exchange counted, and the branches that the busiest rank computed over the mean of the ranks. The samples must
stay what they were. Seconds are left to scaling.py: on a machine of few cores they say little about balance.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.common.hardware import conditions
from benchmarks.common.repeats import relative_l2
from benchmarks.common.results import OUT_HELP, default_folder, save
from benchmarks.scaling.rank_cases import BRANCHES, UNCACHED, chosen, config_path
from benchmarks.scaling.rank_job import Job
from benchmarks.scaling.rank_launch import run_with_torchrun
from benchmarks.simulator.measure import record
from moeca_dist.errors import UserError
from moeca_dist.parallel.expert_placement import PlacementTable
from moeca_dist.tuning.experts.assign import DEFAULT_BALANCE, PlacementEffect, assign_experts, placement_effect
from moeca_dist.tuning.experts.trace import RoutingTrace

FIT_SEED, CHECK_SEED = 7, 0
# Relative L2 of the median image: a route near a tie may fall otherwise where sums are rounded in another order, which
# changes that image.
MOST_DIFFERENCE = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["demo", "bench-dsmoe-s-e48"], help="default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument(
        "--num-images", type=int, default=8, help="to choose from, and to measure; default: %(default)s"
    )
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=[0, 2, 4], help="experts of each block on every rank; default: 0 2 4"
    )
    parser.add_argument("--balance", type=float, default=DEFAULT_BALANCE, help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one launch; default: %(default)s")
    parser.add_argument("--out", type=Path, default=default_folder("expert_placement"), help=OUT_HELP)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        rows = [row for name in args.configs for row in compare(config_path(name), args)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setting = conditions("cpu") | {"balance": args.balance, "overrides": " ".join(args.overrides)}
    save(args.out, {"conditions": setting, "rows": rows}, markdown(rows, setting))
    differing = [row for row in rows if row["rel_l2_median"] > MOST_DIFFERENCE]
    for row in differing:
        print(f"error: {row['config']}, {row['policy']}, {row['num_ranks']} ranks: other samples", file=sys.stderr)
    return 1 if differing else 0


def compare(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for policy in (UNCACHED, BRANCHES):
        fit, check = (
            record(path, policy, args.num_images, args.overrides, seed) for seed in (FIT_SEED, CHECK_SEED)
        )  # fmt: skip
        for num_ranks in args.ranks:
            equal = PlacementTable.contiguous(fit.blocks, fit.num_experts, num_ranks)
            before = _run(path, policy, num_ranks, equal, args)
            for replicas in args.replicas:
                table = assign_experts(fit, num_ranks, args.balance, replicas)
                runs = [before, _run(path, policy, num_ranks, table, args)]
                effects = [placement_effect(check, placed, num_ranks) for placed in (equal, table)]
                row = _row(path.stem, policy, num_ranks, runs, effects, fit)
                rows.append(row | {"replicas": replicas, "most_experts": most_experts(table)})
                print(_line(rows[-1]), flush=True)
    return rows


def most_experts(table: PlacementTable) -> int:
    """Of one block, that a rank holds."""
    return max(len(each.experts_of(rank)) for each in table.by_block.values() for rank in range(each.num_ranks))


def _run(
    path: Path, policy: str, num_ranks: int, table: PlacementTable, args: argparse.Namespace
) -> tuple[int, Any]:  # fmt: skip
    """Bytes sent, and the samples."""
    with tempfile.TemporaryDirectory(prefix="moeca-placement-") as folder:
        file = Path(folder) / "table.json"
        file.write_text(table.to_json({}))
        settings = (
            "model.device=cpu",
            f"sampling.batch_size={args.num_images}",
            f"parallel.expert_placement={file}",
            *args.overrides,
        )
        job = Job(str(path), settings, chosen([policy], num_ranks), args.num_images, 1, 1, CHECK_SEED)
        outcome = run_with_torchrun(job, num_ranks, "cpu", args.timeout)
    return outcome.records[0]["report"]["exchange"]["bytes_sent"], outcome.samples[policy]


def _row(
    config: str, policy: str, num_ranks: int, runs: Sequence[tuple[int, Any]], effects: Sequence[PlacementEffect],
    fit: RoutingTrace,
) -> dict[str, Any]:  # fmt: skip
    (equal_bytes, equal_samples), (placed_bytes, placed_samples) = runs
    by_image = [relative_l2(placed, equal) for placed, equal in zip(placed_samples, equal_samples, strict=True)]
    return {
        "config": config,
        "policy": policy,
        "num_ranks": num_ranks,
        "num_images": fit.num_images,
        "bytes_equal_runs": equal_bytes,
        "bytes_placed": placed_bytes,
        "bytes_ratio": placed_bytes / equal_bytes,
        "slowest_load_equal_runs": float(effects[0].slowest_load),
        "slowest_load_placed": float(effects[1].slowest_load),
        "rel_l2_median": median(by_image),
        "rel_l2_most": max(by_image),
    }


def markdown(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
    facts = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in setting.items() if value != "")
    about = (
        f"Tables chosen on images of seed {FIT_SEED}, measured on as many images of seed {CHECK_SEED}. Bytes are those "
        "that the exchange of the running ranks counted. Busiest rank: branches computed by the busiest rank of each "
        "layer and step over the mean of the ranks, from the recorded routing of the measured images; 1 is even. "
        "Replicas: experts of each block, those that computed most, that every rank holds. Relative L2: of the samples "
        "to those of equal runs; sums are rounded in another order, so a route near a tie may fall otherwise in an "
        "image."
    )
    header = ("config", "policy", "ranks", "replicas", "experts of a block on a rank", "bytes, equal runs",
              "bytes, placed", "ratio", "busiest rank, equal runs",
              "busiest rank, placed", "relative L2 of the median image", "of the worst")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *(_line(row) for row in rows)]
    return "\n\n".join(["# Expert placement from a routing trace", facts, about, "\n".join(lines)]) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    cells = (
        row["config"],
        row["policy"],
        str(row["num_ranks"]),
        str(row["replicas"]),
        str(row["most_experts"]),
        f"{row['bytes_equal_runs'] / 2**20:.1f} MiB",
        f"{row['bytes_placed'] / 2**20:.1f} MiB",
        f"{row['bytes_ratio']:.3f}",
        f"{row['slowest_load_equal_runs']:.3f}",
        f"{row['slowest_load_placed']:.3f}",
        f"{row['rel_l2_median']:.1e}",
        f"{row['rel_l2_most']:.1e}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())

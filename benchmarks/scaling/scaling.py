"""Throughput, latency and efficiency over numbers of ranks: torchrun jobs of real generation on this machine.

    python benchmarks/scaling/scaling.py --ranks 1 2 4 --mode strong --configs demo bench-dsmoe-s-e48

For every number of ranks it launches an expert-parallel job (all ranks share one set of experts) that generates without
a cache and with every caching policy, and a data-parallel one (every rank holds all experts). ``strong``: the same
images on more ranks; ``weak``: as many images per rank. Writes OUT/data.json, table.md and plot.png, anew
after every launch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run by its path: the packages are imported from the checkout's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Before deepspeed is imported: this process computes nothing, and its ranks are told on their own.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from benchmarks.common.hardware import conditions
from benchmarks.common.results import default_folder
from benchmarks.scaling.rank_cases import CELLS, DEFAULT, UNCACHED, chosen, config_path
from benchmarks.scaling.rank_job import Job
from benchmarks.scaling.rank_launch import run_with_torchrun
from benchmarks.scaling.scaling_report import ALONE, summarise, write_results
from moeca_dist.cli.exit_codes import sigterm_as_exit
from moeca_dist.config import load_config
from moeca_dist.errors import UserError

CONFIGS = ("demo", "bench-dsmoe-s-e16", "bench-dsmoe-s-e48")
# Strong scaling: of all ranks together; weak scaling: of each.
NUM_IMAGES = {"demo": {"strong": 40, "weak": 20}}
DEFAULT_NUM_IMAGES = {"strong": 4, "weak": 2}
CPU_RANKS = [1, 2, 4]
# Data parallelism sends nothing, so what a policy saves there shows in one of them.
DATA_PARALLEL = (UNCACHED, DEFAULT)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        with sigterm_as_exit():
            benchmark(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    policies = [cell.name for cell in CELLS]
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="of configs/, or files; default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 4, on CUDA every number of visible GPUs")
    parser.add_argument("--mode", choices=("strong", "weak"), default="strong", help="default: %(default)s")
    parser.add_argument("--layouts", nargs="+", choices=("ep", "dp"), default=["ep", "dp"], help="default: ep dp")
    parser.add_argument("--policies", nargs="+", default=policies, choices=policies, help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-images", type=int, help="strong: of all ranks together; weak: of each rank")
    parser.add_argument("--batch-size", type=int, help="images per rank and round (default: all in one round)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup-steps", type=int, default=3, help="before the repeats; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one launch; default: %(default)s")
    parser.add_argument("--note", default="", help="a remark on the conditions, kept with the results")
    parser.add_argument("--out", type=Path, help="folder of the results; default: in benchmarks/results/scaling")
    args = parser.parse_args(argv)
    if UNCACHED not in args.policies:
        raise UserError(f"--policies needs {UNCACHED}: everything is compared with it")
    args.ranks = sorted(set(args.ranks or default_ranks(args.device)))
    if min([*args.ranks, args.repeats, args.warmup_steps, args.num_images or 1, args.batch_size or 1]) < 1:
        raise UserError("--ranks, --repeats, --warmup-steps, --num-images and --batch-size must be positive")
    if args.out is None:
        folder = default_folder("scaling", args.device)
        args.out = folder.with_name(f"{folder.name}_{args.mode}")
    return args


def default_ranks(device: str) -> list[int]:
    return list(range(1, torch.cuda.device_count() + 1)) if device == "cuda" else CPU_RANKS


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.device == "cuda" and max(args.ranks) > torch.cuda.device_count():
        raise UserError(f"--ranks {max(args.ranks)}: torch finds {torch.cuda.device_count()} CUDA device(s) here")
    paths = [config_path(name) for name in args.configs]
    for path in paths:
        load_config(path, args.overrides)
    setting = conditions(args.device) | {
        "mode": args.mode,
        "threads_per_rank": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "overrides": " ".join(args.overrides),
        "repeats": args.repeats,
        "warmup_steps": args.warmup_steps,
        "note": args.note,
    }
    rows: list[dict[str, Any]] = []
    for path in paths:
        for num_ranks in args.ranks:
            for layout in args.layouts if num_ranks > 1 else [ALONE]:
                job = make_job(path, args, num_ranks, layout)
                outcome = run_with_torchrun(job, num_ranks, args.device, args.timeout)
                for row in summarise(path.stem, layout, num_ranks, outcome, rows):
                    print(row["line"], flush=True)
                    rows.append(row)
                write_results(rows, setting, args.out)
    print(f"wrote {args.out}")
    return rows


def make_job(path: Path, args: argparse.Namespace, num_ranks: int, layout: str) -> Job:
    given = args.num_images or NUM_IMAGES.get(path.stem, DEFAULT_NUM_IMAGES)[args.mode]
    num_images = given if args.mode == "strong" else given * num_ranks
    batch_size = args.batch_size or -(-num_images // num_ranks)
    ep_size = num_ranks if layout == "ep" else 1
    names = [name for name in args.policies if layout != "dp" or name in DATA_PARALLEL]
    overrides = (
        f"model.device={args.device}",
        f"sampling.batch_size={batch_size}",
        f"parallel.ep_size={ep_size}",
        *args.overrides,
    )
    return Job(str(path), overrides, chosen(names, ep_size), num_images, args.repeats, args.warmup_steps)


if __name__ == "__main__":
    sys.exit(main())

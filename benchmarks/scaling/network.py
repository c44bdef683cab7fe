"""Expert parallelism over slow links: each rank in a network namespace of its own, joined by links of a limited rate.

    sudo python -m benchmarks.scaling.network --ranks 2 4 --rates 1000 200 50

Every configuration generates the same images on one rank, and on 2, 4, ... expert-parallel ranks over loopback and over
links of each rate (Mbit/s, both ways), without a cache and with caching policies. Needs root and iproute2. The
machine's own network is not touched, and the namespaces are removed at the end, whatever the end is. Writes
OUT/data.json, table.md and plot.png, anew after every launch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch and deepspeed are imported: this process computes nothing, its ranks are CPU processes.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.common.hardware import conditions
from benchmarks.common.results import OUT_HELP, default_folder
from benchmarks.scaling.netns import JUMBO_MTU, Link, Network, require
from benchmarks.scaling.network_report import summarise, write_results
from benchmarks.scaling.rank_cases import CELLS, COMMON, UNCACHED, chosen, config_path
from benchmarks.scaling.rank_job import Job
from benchmarks.scaling.rank_launch import Outcome, run_in_network, run_with_torchrun
from moeca_dist.cli.exit_codes import sigterm_as_exit
from moeca_dist.config import load_config
from moeca_dist.errors import UserError

CONFIGS = ("demo", "bench-dsmoe-s-e16", "bench-dsmoe-s-e48")
# Per configuration: enough for a batch on every rank, few enough for a cell of seconds to a minute.
NUM_IMAGES = {"demo": 40}
DEFAULT_NUM_IMAGES = 4


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        with sigterm_as_exit():
            rows = benchmark(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = [row for row in rows if row["agrees_with_one_rank"] is False]
    for row in differing:
        print(f"error: {row['line']}: the samples differ from those of one rank", file=sys.stderr)
    return 1 if differing else 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="+", default=CONFIGS, help="names in configs/, or files; default: %(default)s"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="one rank always runs; default: 2 4")
    parser.add_argument("--rates", type=float, nargs="*", default=[1000, 200, 50], help="Mbit/s; default: 1000 200 50")
    parser.add_argument("--burst-kb", type=int, default=64, help="token bucket of each link; default: %(default)s")
    parser.add_argument(
        "--queue-ms", type=float, default=50, help="longest wait in a link's queue; default: %(default)s"
    )
    parser.add_argument("--mtu", type=int, default=JUMBO_MTU, help="bytes of a link's frames; default: %(default)s")
    parser.add_argument("--no-loopback", action="store_true", help="leave out the ranks without namespaces")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=list(COMMON),
        choices=[cell.name for cell in CELLS],
        help="default: %(default)s",
    )
    parser.add_argument("--num-images", type=int, help="of all ranks together (default: 4, demo 40)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--warmup-steps", type=int, default=3, help="of the run before the repeats; default: %(default)s"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one launch; default: %(default)s")
    parser.add_argument("--note", default="", help="a remark on the conditions, kept with the results")
    parser.add_argument("--out", type=Path, default=default_folder("network"), help=OUT_HELP)
    args = parser.parse_args(argv)
    if UNCACHED not in args.policies:
        raise UserError(f"--policies needs {UNCACHED}: everything is compared with it")
    if min([*args.ranks, args.repeats, args.warmup_steps, args.num_images or 1]) < 1 or min(args.rates or [1]) <= 0:
        raise UserError("--ranks, --rates, --repeats, --warmup-steps and --num-images must be positive")
    args.ranks = sorted(set(args.ranks) - {1})
    return args


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    links = [Link(rate, args.burst_kb, args.queue_ms, args.mtu) for rate in args.rates]
    if links:
        require()
    paths = [config_path(name) for name in args.configs]
    for path in paths:
        load_config(path, args.overrides)
    setting = conditions("cpu") | {"threads_per_rank": 1, "warmup_steps": args.warmup_steps, "note": args.note}
    rows: list[dict[str, Any]] = []
    for path in paths:
        jobs = {ep_size: make_job(path, args, ep_size) for ep_size in (1, *args.ranks)}
        alone = run_with_torchrun(jobs[1], 1, "cpu", args.timeout)
        rows += report(path, 1, None, None, alone, alone)
        for ep_size in args.ranks:
            if not args.no_loopback:
                rows += report(
                    path, ep_size, None, None, run_with_torchrun(jobs[ep_size], ep_size, "cpu", args.timeout), alone
                )
            for link in links:
                with Network(ep_size, link) as network:
                    probe = asdict(network.probe())
                    outcome = run_in_network(jobs[ep_size], network, args.timeout)
                rows += report(path, ep_size, link, probe, outcome, alone)
                write_results(rows, setting, args)
        write_results(rows, setting, args)
    print(f"wrote {args.out}")
    return rows


def make_job(path: Path, args: argparse.Namespace, ep_size: int) -> Job:
    num_images = args.num_images or NUM_IMAGES.get(path.stem, DEFAULT_NUM_IMAGES)
    # One round: every rank's share is one batch.
    overrides = ("model.device=cpu", f"sampling.batch_size={num_images}", *args.overrides)
    return Job(str(path), overrides, chosen(args.policies, ep_size), num_images, args.repeats, args.warmup_steps)


def report(
    path: Path, ep_size: int, link: Link | None, probe: dict[str, float] | None, outcome: Outcome, alone: Outcome
) -> list[dict[str, Any]]:
    trained = not load_config(path).model.random_init
    shaped = None if link is None else asdict(link)
    rows = summarise(path.stem, ep_size, shaped, probe, outcome, alone, trained=trained)
    for row in rows:
        print(row["line"], flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())

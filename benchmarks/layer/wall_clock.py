"""Wall clock against FLOPs of cached runs of a large network with random weights, and where the seconds went.

    python -m benchmarks.layer.wall_clock --threads 2

One process, DSMoE-S-E16's shape, random weights: nothing is learnt about quality. The exact run and every policy sample
the same noise one after the other; full steps are 0, 1 and every fifth (11 of 50). Writes OUT/data.json and table.md.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.common.hardware import conditions
from benchmarks.common.results import OUT_HELP, TABLE, default_folder, save
from moeca_dist import Engine, Report, Request
from moeca_dist.config import Config

POLICIES = ("fora", "taylorseer", "moeca_forecast", "moeca", "network_forecast")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="DSMoE-S-E16", help="published size (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images; guidance doubles the rows")
    parser.add_argument("--num-steps", type=int, default=50, help="the sampler's steps (default: %(default)s)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=default_folder("wall_clock"), help=OUT_HELP)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    exact = run(args, "none")
    rows = [row("none", exact, exact)]
    for policy in args.policies:
        rows.append(row(policy, run(args, policy), exact))
        write(args, rows)
    print((args.out / TABLE).read_text())
    return 0


def full_steps(num_steps: int) -> list[int]:
    return sorted({0, min(1, num_steps - 1), *range(0, num_steps, 5)})


def run(args: argparse.Namespace, policy: str) -> Report:
    torch.manual_seed(0)  # the same weights for all
    cache: dict[str, Any] = {"policy": policy}
    if policy != "none":
        cache["full_steps"] = full_steps(args.num_steps)
    config = {
        "model": {"name": args.name, "random_init": True, "device": "cpu"},
        "cache": cache,
        "sampling": {"num_steps": args.num_steps, "batch_size": args.batch_size},
    }
    engine = Engine.from_config(Config.model_validate(config))
    return engine.generate([Request(index, index) for index in range(args.batch_size)], progress=True)[1]


def row(policy: str, report: Report, exact: Report) -> dict[str, Any]:
    """``cache_steps``: seconds by section of the steps that are not full, all together."""
    full = set(full_steps(report.num_steps)) if policy != "none" else set(range(report.num_steps))
    per_step = report.seconds.per_step
    wall = exact.denoise_s / report.denoise_s
    return {
        "policy": policy,
        "denoise_s": report.denoise_s,
        "flops_ratio": report.flops.speedup,
        "wall_ratio": wall,
        "wall_per_flops": wall / report.flops.speedup,
        "unmatched_share": report.branches.unmatched / report.branches.routed,
        "seconds": report.seconds.slowest,
        "cache_steps": {
            name: sum(each for step, each in enumerate(seconds) if step not in full)
            for name, seconds in per_step.items()
        },
        "report": asdict(report),
    }


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    facts = conditions("cpu") | {"threads": args.threads}
    lines = [
        f"# Wall clock against FLOPs: {args.name}, random weights, batch {args.batch_size}, {args.num_steps} steps",
        "",
        "| policy | denoising s | FLOPs ratio | wall clock | of the FLOPs ratio | unmatched | bookkeeping of the run "
        "| of cache steps | seconds by section |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for each in rows:
        total, cached = sum(each["seconds"].values()), sum(each["cache_steps"].values())
        sections = ", ".join(f"{name} {seconds:.1f}" for name, seconds in each["seconds"].items())
        part = each["cache_steps"].get("bookkeeping", 0.0) / cached if cached else 0.0
        lines.append(
            f"| {each['policy']} | {each['denoise_s']:.1f} | {each['flops_ratio']:.2f}x | {each['wall_ratio']:.2f}x "
            f"| {each['wall_per_flops']:.0%} | {each['unmatched_share']:.1%} "
            f"| {each['seconds'].get('bookkeeping', 0.0) / total:.1%} | {part:.1%} | {sections} |"
        )
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    save(args.out, {"conditions": facts, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())

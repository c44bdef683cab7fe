"""Exchange modes on the shipped model: what agreeing once per step saves, and what deciding a step ahead costs.

    python benchmarks/exchange.py --ranks 1 2

Every policy of single branches runs with both modes and its default schedule; images are compared with the uncached
ones of the same noise and the same number of ranks. Nothing is timed: what an agreement takes depends on the network.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from hardware import conditions
from torch.multiprocessing import spawn

from moeca_dist import Engine, Request
from moeca_dist.parallel.mesh import LauncherEnv, Mesh
from moeca_dist.quality import PairedQuality, unit_images

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
POLICIES = ("moeca_forecast", "moeca", "random")
MODES = ("exact", "planned")


def main() -> int:
    args = parse_arguments()
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    # Now, and not when the results are written: the workers import the code of this moment.
    setting = conditions("cpu")
    rows = []
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            spawn(run_rank, (num_ranks, free_port(), args, out), nprocs=num_ranks)
            rows += json.loads(out.read_text())
    write_results(rows, setting, args)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="sizes of the expert-parallel group")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the searched schedule saw seed 7")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exchange")
    return parser.parse_args()


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_rank(rank: int, num_ranks: int, port: int, args: argparse.Namespace, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    mesh = Mesh.create(LauncherEnv.read(), device_type="cpu")
    requests = [[Request(index, index % 10, seed=seed) for index in range(args.images)] for seed in args.seeds]
    uncached = run(mesh, requests, args, "cache.policy=none")
    rows = [
        row(
            mesh,
            policy,
            mode,
            run(mesh, requests, args, f"cache.policy={policy}", f"parallel.exchange={mode}"),
            uncached,
        )
        for policy in POLICIES
        for mode in MODES
    ]
    if rank == 0:
        out.write_text(json.dumps(rows))
    mesh.close()


def run(mesh: Mesh, requests: list[list[Request]], args: argparse.Namespace, *overrides: str) -> list[tuple[Any, Any]]:
    engine = Engine.from_config(CONFIG, [*overrides, f"sampling.num_steps={args.steps}"], mesh=mesh)
    return [engine.generate(wanted) for wanted in requests]


def row(
    mesh: Mesh, policy: str, mode: str, made: list[tuple[Any, Any]], uncached: list[tuple[Any, Any]]
) -> dict[str, Any]:
    """Totals over the seeds; PSNR of each seed is the mean over its images."""
    psnr = []
    for (images, _), (reference, _) in zip(made, uncached, strict=True):
        if mesh.rank == 0:
            quality = PairedQuality()
            quality.add(unit_images(images), unit_images(reference))
            psnr.append(round(quality.result().psnr_db, 2))
    reports = [report for _, report in made]
    total = {name: sum(getattr(report.exchange, name) for report in reports) for name in COUNTED}
    routed = sum(report.branches.routed for report in reports)
    return {
        "ranks": mesh.world_size,
        "policy": policy,
        "mode": mode,
        "psnr_db": psnr,
        "flops_ratio": reports[0].flops.speedup,
        "unmatched_share": sum(report.branches.unmatched for report in reports) / routed,
        "uncached_bytes": sum(report.exchange.bytes_sent for _, report in uncached),
    } | total


COUNTED = ("bytes_sent", "collectives", "collectives_elided", "agreements")


def write_results(rows: list[dict[str, Any]], setting: dict[str, Any], args: argparse.Namespace) -> None:
    lines = ["# Exchange modes on the shipped model", "", *(f"- {name}: {value}" for name, value in setting.items())]
    lines += [
        f"- images: {args.images} for each of the seeds {args.seeds}, {args.steps} steps, guidance 1.5",
        "",
        METHOD,
    ]
    for ranks in args.ranks:
        lines += ["", f"## {ranks} rank(s)", "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows if row["ranks"] == ranks]
    args.out.with_suffix(".json").write_text(json.dumps({"conditions": setting, "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


HEADER = ("policy", "mode", "PSNR dB by seed", "FLOPs", "unmatched", "bytes", "collectives", "agreements")
METHOD = """\
**PSNR** against the uncached images, mean over images. **FLOPs**: uncached / computed. **Unmatched**: branches computed
because they were new to their token. **Bytes**: payload sent, as a share of the uncached run's. **Collectives**:
payload collectives of each rank, issued + not needed, all seeds. **Agreements**: gatherings of row counts, each a wait
for all ranks and a host synchronisation."""


def cells(row: dict[str, Any]) -> list[str]:
    sent = f"{row['bytes_sent'] / row['uncached_bytes']:.1%}" if row["uncached_bytes"] else "-"
    return [
        f"`{row['policy']}`",
        row["mode"],
        " ".join(f"{psnr:.1f}" for psnr in row["psnr_db"]),
        f"{row['flops_ratio']:.2f}x",
        f"{row['unmatched_share']:.2%}",
        sent,
        f"{row['collectives']:,} + {row['collectives_elided']:,}",
        f"{row['agreements']:,}",
    ]


if __name__ == "__main__":
    sys.exit(main())

"""What clusters of H100 GPUs should do with the published networks: a plan, not a measurement.

    python -m benchmarks.simulator.plan                # writes OUT/data.json, table.md and plot.png

Every layout of 8, 64, 512 and 4096 GPUs (the size of the expert-parallel group, the rest data-parallel), uncached and
with several policies, from the roofline of ``gpu.py`` and the link model of ``links.py``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.hardware import conditions
from benchmarks.common.results import OUT_HELP, PLOT, default_folder, save
from benchmarks.simulator.gpu import BYTES, H100, NVLINK_AND_400G, PCIE, RTX_4090, Gpu, GpuMachine, Shape, zipf_routing
from benchmarks.simulator.links import Topology
from benchmarks.simulator.plan_report import plan_markdown, plot
from benchmarks.simulator.step import StepTime, simulate_step
from moeca_dist.cache.policies.moeca_forecast import scaled_steps
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.tuning.experts.traffic import LayerTraffic, Returns, RowBytes, layer_traffic

SHAPES = (
    Shape("DSMoE-3B-E16", 30, 15, 1152, 16, 2, 2880, 2880, 4608, 256, 32, 50, 3.102e9, "256 x 256"),
    Shape("DiT-MoE-G-16E2A", 40, 40, 1408, 16, 2, 5632, 2816, 0, 256, 32, 50, 16.504e9, "256 x 256"),
    Shape(
        "HiDream-I1", 48, 48, 2560, 4, 2, 6912, 3584, 0, 4352, 1, 50, 17.1e9,
        "1024 x 1024 and 256 text tokens, routed in all blocks",
    ),
    Shape(
        "HunyuanImage-3.0", 32, 32, 4096, 64, 8, 3072, 3072, 0, 4352, 1, 50, 80e9,
        "1024 x 1024 and 256 text tokens; keys and values of a quarter of the heads; writing text is not counted", 0.25,
    ),
)  # fmt: skip
GPUS = (8, 64, 512, 4096)
ZIPF = 0.3
REFRESH_SHARE = 0.022  # of the branches in a cache step: measured on the shipped model
SAMPLED_TOKENS = 16384  # of a group
SAMPLED_LAYERS = 4
# DICE (arXiv 2411.16786) reports 61.7-73.3% of a step in the all-to-all for DiT-MoE-XL on 8 RTX 4090 over PCIe.
REPORTED_SHARES = (0.617, 0.733)
CHECK = Shape("DiT-MoE-XL-8E2A", 28, 28, 1152, 8, 2, 4608, 2304, 0, 256, 4, 50, 4.168e9, "batch 32 on 8 GPUs")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="default: %(default)s")
    parser.add_argument("--zipf", type=float, default=ZIPF, help="skew of the routing; default: %(default)s")
    parser.add_argument("--refresh-share", type=float, default=REFRESH_SHARE, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=default_folder("plan"), help=OUT_HELP)
    args = parser.parse_args(argv)
    rows = [
        plan(shape, gpus, ep_size, args)
        for shape in SHAPES
        for gpus in args.gpus
        for ep_size in layouts(shape, gpus)
    ]  # fmt: skip
    setting = conditions("cpu") | {"zipf": args.zipf, "refresh_share": args.refresh_share}
    check = share_of_exchange(CHECK, RTX_4090, PCIE, 8, args.zipf)
    save(args.out, {"conditions": setting, "check": check, "rows": rows}, plan_markdown(rows, setting, SHAPES, check))
    plot(rows, args.out / PLOT)
    print(f"wrote {args.out}")
    return 0


def layouts(shape: Shape, gpus: int) -> list[int]:
    """Sizes of the group: an island or less, one rank per expert, and (to see where it ends) all GPUs."""
    return sorted({min(8, shape.num_experts), min(shape.num_experts, gpus), gpus})


def plan(shape: Shape, gpus: int, ep_size: int, args: argparse.Namespace) -> dict[str, Any]:
    full_steps = len(scaled_steps(shape.num_steps))
    share = full_steps / shape.num_steps
    groups = min(gpus // ep_size, 4)

    def mean_step(returns: Returns, coded: bool = False) -> StepTime:
        """Of the slowest of some groups, which draw their own routing."""
        found = [
            _step(shape, H100, NVLINK_AND_400G, ep_size, args, returns, share, seed, coded) for seed in range(groups)
        ]
        return max(found, key=lambda time: time.total)

    uncached = mean_step("sums")
    machine = GpuMachine(shape, H100, NVLINK_AND_400G, ep_size, 1.0, keeps=False)
    between = StepTime(home=machine.network_forecast_s())

    def network(full: StepTime) -> float:
        return (full * share + between * (1 - share)).total

    at_home, at_owners = mean_step("branches"), mean_step("owner")
    return {
        "model": shape.name,
        "gpus": gpus,
        "ep_size": ep_size,
        "dp_size": gpus // ep_size,
        "images_per_gpu": shape.images_per_gpu,
        "num_steps": shape.num_steps,
        "uncached_ms": 1000 * uncached.total,
        "uncached_exchange_share": (uncached.exchange + uncached.agree) / uncached.total,
        "uncached_wait_share": uncached.wait / uncached.total,
        "network_ms": 1000 * network(uncached),
        "network_gain": uncached.total / network(uncached),
        "network_coded_ms": 1000 * network(mean_step("sums", coded=True)),
        "branches_home_ms": 1000 * at_home.total,
        "branches_owner_ms": 1000 * at_owners.total,
        "branches_gain": uncached.total / at_home.total,
        "uncached_images_per_s": gpus * shape.images_per_gpu / (shape.num_steps * uncached.total),
        "network_images_per_s": gpus * shape.images_per_gpu / (shape.num_steps * network(uncached)),
        "weight_gib": shape.weight_bytes(ep_size) / 2**30,
        "branches_cache_gib": shape.stored_bytes() / 2**30,
    }  # fmt: skip


def share_of_exchange(shape: Shape, gpu: Gpu, topology: Topology, ranks: int, zipf: float) -> dict[str, Any]:
    """The exchange's share of an uncached step, and at which rates of the links it would be what DICE reports."""
    args = argparse.Namespace(zipf=zipf, refresh_share=REFRESH_SHARE)
    time = _step(shape, gpu, topology, ranks, args, "sums", 1.0, 0)
    sent, (level,) = time.exchange + time.agree, topology.levels
    rest = time.total - sent
    return {
        "model": shape.name, "gpu": gpu.name, "ranks": ranks, "step_ms": 1000 * time.total,
        "exchange_share": sent / time.total,
        "implied_gb_s": [level.bytes_per_s / 1e9 * sent / (rest * share / (1 - share)) for share in REPORTED_SHARES],
    }  # fmt: skip


def _step(
    shape: Shape, gpu: Gpu, topology: Topology, ep_size: int, args: argparse.Namespace, returns: Returns,
    full_share: float, seed: int, coded: bool = False,
) -> StepTime:  # fmt: skip
    """The mean step of a run: full and cache steps in their proportion, or where nothing is kept a full step."""
    tokens = max(8, SAMPLED_TOKENS // ep_size)
    scale = shape.rank_tokens / tokens
    machine = GpuMachine(shape, gpu, topology, ep_size, scale, keeps=returns != "sums", coded=coded)
    placement = ExpertPlacement.contiguous(shape.num_experts, ep_size)
    # Some layers are drawn and stand for all.
    drawn = [_layers(shape, placement, tokens, args, returns, seed * 100 + layer, coded)
             for layer in range(min(SAMPLED_LAYERS, shape.moe_blocks))]  # fmt: skip
    full, cache = ([drawn[layer % len(drawn)][kind] for layer in range(shape.moe_blocks)] for kind in ("full", "cache"))
    computed = simulate_step(0, full, machine)
    if returns == "sums":
        return computed
    return computed * full_share + simulate_step(1, cache, machine, full=False) * (1 - full_share)


def _layers(
    shape: Shape, placement: ExpertPlacement, tokens: int, args: argparse.Namespace, returns: Returns,
    seed: int, coded: bool,
) -> dict[str, LayerTraffic]:  # fmt: skip
    ids_TK, home_T = zipf_routing(shape, placement.num_ranks, tokens, args.zipf, seed)
    row = RowBytes.int8(shape.hidden) if coded else RowBytes.exact(BYTES * shape.hidden)
    computed = {"full": np.ones(ids_TK.shape, bool)}
    computed["cache"] = np.random.default_rng(seed).random(ids_TK.shape) < args.refresh_share
    return {kind: layer_traffic(ids_TK, fresh, home_T, placement, row, returns) for kind, fresh in computed.items()}


if __name__ == "__main__":
    sys.exit(main())

"""Whole denoising runs on published shapes with random weights: seconds, work and memory of every way to cache.

    python -m benchmarks.layer.gpu_e2e --device cuda

Every row is a whole run after one to warm up; the figure is the median of ``--repeats``. The exact path is eager
PyTorch without a cache; TaylorSeer and FORA are this package's own policies. "Of the limit" is the work that was
counted, divided by the time and by the rate of a matrix product measured in the same run.
"""

import argparse
import gc
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common.device_timing import Roofline, measure_roofline
from benchmarks.common.hardware import conditions
from benchmarks.common.results import default_folder, save
from benchmarks.layer.kernels import BATCHES, MODELS
from moeca_dist import Engine, Request
from moeca_dist.config import Config

CONTENDERS: dict[str, dict[str, Any]] = {
    "exact": {},
    "network_forecast": {"cache": {"policy": "network_forecast"}},
    "moeca_forecast": {"cache": {"policy": "moeca_forecast"}},
    "taylorseer": {"cache": {"policy": "taylorseer"}},
    "fora": {"cache": {"policy": "fora"}},
}
GRAPHED = "exact, CUDA graphs"


def contenders(device: str) -> list[str]:
    return [*CONTENDERS, *([GRAPHED] if device == "cuda" else [])]


def config_of(model: str, batch: int, contender: str, arguments: argparse.Namespace) -> Config:
    quick = arguments.quick
    return Config.model_validate(
        {
            "model": {
                "name": model, "random_init": True, "device": arguments.device,
                "dtype": "float32" if arguments.device == "cpu" else "bfloat16", "cuda_graphs": contender == GRAPHED,
                "kernels": arguments.kernels,
            } | ({"input_size": 8} if quick else {}),
            "sampling": {"num_steps": 30 if quick else 50, "batch_size": batch},
        }
        | CONTENDERS.get(contender, {})
    )  # fmt: skip


def measured(
    config: Config, loaded: Engine | None, batch: int, repeats: int, roofline: Roofline
) -> tuple[dict[str, Any], Engine]:
    """One row, and the engine whose weights the next row takes over."""
    engine = Engine.from_config(config) if loaded is None else Engine(config, loaded.mesh, loaded.model)
    requests = [Request(index, index % 1000) for index in range(batch)]
    engine.generate(requests)
    on_gpu = engine.mesh.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    reports = [engine.generate(requests)[1] for _ in range(repeats)]
    seconds = median(report.denoise_s for report in reports)
    report = reports[-1]
    per_step = [sum(of_step) for of_step in zip(*report.seconds.per_step.values(), strict=True)]
    full = full_steps(engine)
    cached = [spent for step, spent in enumerate(per_step) if step not in full]
    return {
        "seconds": seconds,
        "full_step_s": median(per_step[step] for step in full),
        "cached_step_s": median(cached) if cached else None,
        "flop": report.flops.computed,
        "flop_ratio": report.flops.speedup,
        "of_limit": report.flops.computed / seconds / roofline.gemm_flop_per_s,
        "cache_bytes": report.cache.bytes_peak,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }, engine


def full_steps(engine: Engine) -> list[int]:
    """Steps in which both guidance halves are computed."""
    if engine.policy is None:
        return list(range(engine.num_steps))
    by_half = engine.fitted_for().cache["full_steps"].values()
    return sorted(set.intersection(*map(set, by_half)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    roofline = measure_roofline(device, dtype, quick=arguments.quick)
    rows: list[dict[str, Any]] = []
    for model in arguments.models[:1] if arguments.quick else arguments.models:
        engine = None
        for batch in (1,) if arguments.quick else arguments.batches:
            exact_s = 0.0
            for contender in contenders(arguments.device):
                config = config_of(model, batch, contender, arguments)
                row = {"model": model, "batch": batch, "contender": contender}
                try:
                    figures, engine = measured(config, engine, batch, arguments.repeats, roofline)
                except torch.cuda.OutOfMemoryError:
                    rows.append(row | {"out_of_memory": True})
                    continue
                exact_s = exact_s or figures["seconds"]
                rows.append(row | figures | {"speedup": exact_s / figures["seconds"]})
        del engine
        gc.collect()
    return {
        "conditions": conditions(arguments.device),
        "gemm_flop_per_s": roofline.gemm_flop_per_s,
        "copy_bytes_per_s": roofline.copy_bytes_per_s,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Measured by `{results['conditions']['command']}` on {results['conditions']['device']}: "
        f"matrix product {results['gemm_flop_per_s'] / 1e12:.2f} TFLOP/s.",
        "",
        "| model | batch | run | s | faster | FLOP ratio | full step ms | cached step ms | of the limit | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        start = f"| {row['model']} | {row['batch']} | {row['contender']} |"
        if row.get("out_of_memory"):
            lines.append(f"{start} out of memory | | | | | | |")
            continue
        cached = "" if row["cached_step_s"] is None else f"{1000 * row['cached_step_s']:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"{start} {row['seconds']:.3f} | {row['speedup']:.2f}x | {row['flop_ratio']:.2f}x "
            f"| {1000 * row['full_step_s']:.2f} | {cached} | {100 * row['of_limit']:.0f}% | {peak} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kernels", choices=("torch", "triton"), default="torch", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one small network and few steps, to see that all run")
    parser.add_argument("--out", type=Path, help="folder of the results; default: in benchmarks/results/gpu_e2e")
    arguments = parser.parse_args()
    results = measure(arguments)
    save(arguments.out or default_folder("gpu_e2e", arguments.device), results, table(results))
    print(table(results))


if __name__ == "__main__":
    main()

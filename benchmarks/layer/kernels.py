"""The kernels of a cached step on published shapes: time and bytes, and how near each is to the memory's bandwidth.

    python -m benchmarks.layer.kernels --device cuda

On CUDA the kernels are those in Triton, beside plain PyTorch; on CPU PyTorch alone runs. Bytes are those that must move
once, counted from the shapes. The bandwidth is that of a copy, measured in the same run. With guidance, so a batch of
B images has 2B.

Shape suffixes: B images with guidance, T tokens of an image, D hidden size, N branches, M fresh branches.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.device_timing import measure_roofline, median_seconds
from benchmarks.common.hardware import conditions
from benchmarks.common.results import default_folder, save
from moeca_dist.cache.storage import Packed
from moeca_dist.kernels.reference import REFERENCE
from moeca_dist.kernels.select import kernels_of
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    Kernels,
    StoredBranches,
)
from moeca_dist.models.registry import published_spec
from moeca_dist.models.spec import ModelSpec

MODELS = ("DSMoE-S-E16", "DSMoE-S-E48", "DSMoE-L-E16", "DSMoE-L-E48", "DSMoE-3B-E16", "DiT-MoE-XL-8E2A")
BATCHES = (1, 8, 32, 128)
FRESH = 0.02  # share of the branches that a cached step computes, as on the shipped model
GAP = 3  # steps between a stored value and now
INPUT_SETS = 3


@dataclass(frozen=True)
class Case:
    """One kernel on one shape: what it must move, and how to run it on one of several input sets."""

    kernel: str
    num_bytes: int
    inputs: Sequence[Any]
    run: Callable[[Kernels, Any], object]


def cases(spec: ModelSpec, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    tokens, width, k, experts = spec.num_tokens, spec.hidden_size, spec.num_experts_per_tok, spec.num_experts
    all_tokens, row = images * tokens, width * dtype.itemsize
    normal = partial(torch.randn, device=device, dtype=dtype)
    fresh = max(1, round(FRESH * all_tokens * k))

    def gather() -> Any:
        return (
            normal(all_tokens, width),
            torch.randint(0, all_tokens, (fresh,), device=device),
            torch.randint(0, experts, (fresh,), device=device),
            experts,
        )

    def serve() -> Any:
        num_branches = all_tokens * k
        values, slopes = (Packed(normal(num_branches, width), None, dtype) for _ in range(2))
        step_N = torch.zeros(num_branches, dtype=torch.int32, device=device)
        row_N = torch.arange(num_branches, device=device)
        branch_M = torch.randperm(num_branches, device=device)[:fresh].sort().values
        found_N = torch.ones(num_branches, dtype=torch.bool, device=device)
        refresh_N = torch.zeros_like(found_N).index_fill_(0, branch_M, True)
        gate_N = torch.rand(num_branches, device=device)
        branches = BranchesToServe(row_N // k, row_N[::k].clone(), gate_N, row_N, found_N, refresh_N)
        rows = FreshRows(normal(fresh, width), branch_M, torch.arange(fresh, device=device))
        return StoredBranches(values, slopes, step_N), branches, rows, GAP

    def residual() -> Any:
        x_BTD, value_BTD, slope_BTD, after_BTD, out_BTD = (normal(images, tokens, width) for _ in range(5))
        gate_BD, shift_BD, scale_BD = normal(images, 3 * width).chunk(3, -1)
        return x_BTD, gate_BD, Forecast(value_BTD, [(slope_BTD, float(GAP))]), after_BTD, Entering(
            out_BTD, shift_BD, scale_BD
        )  # fmt: skip

    def drawn(draw: Callable[[], Any]) -> list[Any]:
        return [draw() for _ in range(INPUT_SETS)]

    yield Case("gather_rows", 2 * fresh * row, drawn(gather), lambda kernels, sets: kernels.gather_rows(*sets))
    # Values and slopes of what is served; a fresh row is read and stored, and its old value gives the slope.
    served = 2 * (all_tokens * k - fresh) + 4 * fresh + all_tokens
    yield Case("serve_branches", served * row, drawn(serve), lambda kernels, sets: kernels.serve_branches(*sets))
    yield Case(
        "gated_residual", 4 * all_tokens * row, drawn(residual),
        lambda kernels, sets: kernels.gated_residual(*sets[:4]),
    )  # fmt: skip
    yield Case(
        "residual_modulated", 5 * all_tokens * row, drawn(residual),
        lambda kernels, sets: kernels.residual_modulated(*sets),
    )  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device, quick = torch.device(arguments.device), arguments.quick
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    measured = kernels_of("triton" if device.type == "cuda" else "torch", device)
    copy_bytes_per_s = measure_roofline(device, dtype, quick=quick).copy_bytes_per_s
    rows = []
    for name in arguments.models[:1] if quick else arguments.models:
        for batch in (1,) if quick else arguments.batches:
            for case in cases(published_spec(name), 2 * batch, device, dtype):
                chosen, plain = (
                    median_seconds(partial(case.run, kernels), case.inputs, 3 if quick else 30, device)
                    for kernels in (measured, REFERENCE)
                )
                rows.append(
                    {
                        "model": name, "batch": batch, "kernel": case.kernel, "bytes": case.num_bytes,
                        "seconds": chosen, "reference_seconds": plain,
                        "of_limit": case.num_bytes / copy_bytes_per_s / chosen,
                    }
                )  # fmt: skip
    return {
        "conditions": conditions(arguments.device),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": type(measured).__name__,
        "copy_bytes_per_s": copy_bytes_per_s,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Measured by `{results['conditions']['command']}` on {results['conditions']['device']}, "
        f"{results['dtype']}: copy {results['copy_bytes_per_s'] / 1e9:.1f} GB/s. Kernels: {results['kernels']}.",
        "",
        "| model | batch | kernel | MB | us | plain PyTorch us | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['batch']} | {row['kernel']} | {row['bytes'] / 1e6:.2f} | {row['seconds'] * 1e6:.1f} "
        f"| {row['reference_seconds'] * 1e6:.1f} | {100 * row['of_limit']:.0f}% |"
        for row in results["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--quick", action="store_true", help="one small case of each kernel, to see that all run")
    parser.add_argument("--out", type=Path, help="folder of the results; default: in benchmarks/results/kernels")
    arguments = parser.parse_args()
    with torch.inference_mode():
        results = measure(arguments)
    save(arguments.out or default_folder("kernels", arguments.device), results, table(results))
    print(table(results))


if __name__ == "__main__":
    main()

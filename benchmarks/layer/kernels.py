"""The kernels of a cached step on published shapes: time, bytes and FLOP, and how near each is to the device's limits.

    python -m benchmarks.layer.kernels --device cuda --out benchmarks/results/kernels_cuda

Bytes are those that must move once, FLOP those of the router's product; both are counted from the shapes. The limits
are measured in the same run. With guidance, so a batch of B images has 2B.

Shape suffixes: T tokens, K routed experts and entries per token, D hidden size, E experts, N fresh branches.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.device_timing import measure_roofline, median_seconds
from benchmarks.hardware import conditions
from moeca_dist.cache.storage import Packed
from moeca_dist.kernels.int8_rows import FORMATS, SCALE_BYTES
from moeca_dist.kernels.reference import ReferenceKernels
from moeca_dist.kernels.select import kernels_for
from moeca_dist.kernels.types import (
    BranchesToServe,
    Entering,
    Forecast,
    FreshRows,
    HeldRows,
    Kernels,
    RouterWeights,
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
    """One kernel on one shape: what it must move and multiply, and how to run it on one of several input sets."""

    kernel: str
    num_bytes: int
    flop: int
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
        )

    def serve() -> Any:
        stored, slopes = (Packed(normal(all_tokens, k, width), None, dtype) for _ in range(2))
        steps_TK = torch.zeros(all_tokens, k, dtype=torch.int32, device=device)
        branch_N = torch.randperm(all_tokens * k, device=device)[:fresh].sort().values
        refresh_TK = torch.zeros(all_tokens * k, dtype=torch.bool, device=device).index_fill_(0, branch_N, True)
        entry_TK = torch.arange(k, device=device).expand(all_tokens, k).contiguous()
        branches = BranchesToServe(
            torch.rand(all_tokens, k, device=device), entry_TK, torch.ones_like(entry_TK, dtype=torch.bool),
            refresh_TK.view(all_tokens, k),
        )  # fmt: skip
        rows = FreshRows(normal(fresh, width), branch_N, torch.arange(fresh, device=device))
        return StoredBranches(stored, slopes, steps_TK), branches, rows

    def residual() -> Any:
        x_BTD, value_BTD, slope_BTD, after_BTD, out_BTD = (normal(images, tokens, width) for _ in range(5))
        gate_BD, shift_BD, scale_BD = normal(images, 3 * width).chunk(3, -1)
        return x_BTD, gate_BD, Forecast(value_BTD, [(slope_BTD, float(GAP))]), after_BTD, Entering(
            out_BTD, shift_BD, scale_BD
        )  # fmt: skip

    def route() -> Any:
        router = RouterWeights(normal(experts, width).float(), None, k, "sigmoid", True, 2.0)
        stored_ids_TK = torch.rand(all_tokens, experts, device=device).argsort(-1)[:, :k].contiguous()
        return normal(all_tokens, width), router, stored_ids_TK

    def change() -> Any:
        held_SD = normal(all_tokens, width)
        near_ND = held_SD + 0.1 * normal(all_tokens, width)
        return near_ND, HeldRows(held_SD, torch.randperm(all_tokens, device=device)), FORMATS["int8"]

    def coded() -> Any:
        near_ND, held, form = change()
        return ReferenceKernels().encode_rows(near_ND, held, form), held, form, width, dtype

    def drawn(draw: Callable[[], Any]) -> list[Any]:
        return [draw() for _ in range(INPUT_SETS)]

    yield Case(
        "gather_rows", 2 * fresh * row, 0, drawn(gather), lambda kernels, sets: kernels.gather_rows(*sets, experts)
    )
    # Values and slopes of what is served; a fresh row is read and stored, and its old value gives the slope.
    served = 2 * (all_tokens * k - fresh) + 4 * fresh + all_tokens
    yield Case(
        "serve_branches", served * row, 0, drawn(serve), lambda kernels, sets: kernels.serve_branches(*sets, GAP)
    )
    yield Case(
        "gated_residual", 4 * all_tokens * row, 0, drawn(residual),
        lambda kernels, sets: kernels.gated_residual(*sets[:4]),
    )  # fmt: skip
    yield Case(
        "residual_modulated", 5 * all_tokens * row, 0, drawn(residual),
        lambda kernels, sets: kernels.residual_modulated(*sets),
    )  # fmt: skip
    yield Case(
        "route", all_tokens * row, 2 * all_tokens * width * experts, drawn(route),
        lambda kernels, sets: kernels.route(*sets),
    )  # fmt: skip
    # A row for each token, as with one other owner: the row, what is held before and after, and a byte for each value.
    with_codes = all_tokens * (3 * row + width + SCALE_BYTES)
    yield Case("encode_rows", with_codes, 0, drawn(change), lambda kernels, sets: kernels.encode_rows(*sets))
    yield Case("decode_rows", with_codes, 0, drawn(coded), lambda kernels, sets: kernels.decode_rows(*sets))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device, quick = torch.device(arguments.device), arguments.quick
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    roofline = measure_roofline(device, dtype, quick=quick)
    rows = []
    for name in arguments.models[:1] if quick else arguments.models:
        for batch in (1,) if quick else arguments.batches:
            for case in cases(published_spec(name), 2 * batch, device, dtype):
                chosen, plain = (
                    median_seconds(partial(case.run, kernels), case.inputs, 3 if quick else 30, device)
                    for kernels in (kernels_for(device), ReferenceKernels())
                )
                floor = roofline.floor_seconds(case.num_bytes, case.flop)
                rows.append(
                    {
                        "model": name, "batch": batch, "kernel": case.kernel, "bytes": case.num_bytes,
                        "flop": case.flop, "seconds": chosen, "reference_seconds": plain, "of_limit": floor / chosen,
                    }
                )  # fmt: skip
    return {
        "conditions": conditions(arguments.device),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": type(kernels_for(device)).__name__,
        "copy_bytes_per_s": roofline.copy_bytes_per_s,
        "gemm_flop_per_s": roofline.gemm_flop_per_s,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Measured by `{results['conditions']['command']}` on {results['conditions']['device']}, "
        f"{results['dtype']}: copy {results['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix product {results['gemm_flop_per_s'] / 1e12:.2f} TFLOP/s. Kernels: {results['kernels']}.",
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


def write(results: dict[str, Any], text: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--quick", action="store_true", help="one small case of each kernel, to see that all run")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without its suffix")
    arguments = parser.parse_args()
    with torch.inference_mode():
        results = measure(arguments)
    write(results, table(results), arguments.out)


if __name__ == "__main__":
    main()

"""One expert-parallel MoE layer against DeepSpeed's two and a naive loop: dispatch, experts, combine; router given.

    python -m benchmarks.layer.layer --ranks 1 2

Every round runs each contender once, in an order drawn anew, on the same weights, tokens and routing. A round's time is
that of the slowest rank. All outputs are compared before anything is timed.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks.common.hardware import busy_core_seconds, conditions
from benchmarks.common.local_ranks import become_rank, free_port
from benchmarks.common.results import default_folder
from benchmarks.layer.layer_cases import PUBLISHED, TINY, TOKENS_PER_IMAGE, Case, make_cases, make_experts, make_input
from benchmarks.layer.layer_contenders import CONTENDERS, Layer, Setup, classic_gate
from benchmarks.layer.layer_report import summarise, write_results
from moeca_dist.parallel.expert_placement import ExpertPlacement
from moeca_dist.parallel.mesh import LauncherEnv, Mesh

T = TypeVar("T")
# Relative L2 distance to the naive loop above which nothing is timed.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def main() -> int:
    args = parse_arguments()
    os.environ.update(worker_environment(args))
    # Now, and not when the results are written: the workers import the code of this moment.
    setting = conditions(args.device) | {
        "threads_per_rank": args.threads,
        "freed_memory": args.memory,
        "note": args.note,
    }
    results = []
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results.pt"
            spawn(run_rank, (num_ranks, free_port(), args, out), nprocs=num_ranks)
            results += torch.load(out)
    write_results(results, setting, args)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: fp32, gloo; cuda: bf16, nccl")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="sizes of the expert-parallel group")
    parser.add_argument("--images", type=int, help="images per rank, CFG halves included (default: 4, on CUDA 32)")
    parser.add_argument(
        "--repeats", type=int, default=25, help="timed rounds per case; four times that for sparse ones"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    parser.add_argument(
        "--memory",
        choices=("kept", "returned"),
        default="kept",
        help="kept: freed memory stays with the process, as with CUDA's caching allocator; returned: glibc gives large "
        "buffers back, and each contender pays page faults for whoever ran before it",
    )
    parser.add_argument("--only", default="", help="run the shapes whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and 3 rounds: does it run and agree?")
    parser.add_argument("--note", default="", help="a remark on the conditions, kept with the results")
    parser.add_argument("--out", type=Path, help="folder of the results; default: in benchmarks/results/layer")
    args = parser.parse_args(argv)
    args.images = args.images or (32 if args.device == "cuda" else 4)
    args.repeats = 3 if args.quick else args.repeats
    args.out = args.out or default_folder("layer", args.device)
    return args


def worker_environment(args: argparse.Namespace) -> dict[str, str]:
    """What has to be set before a worker process starts."""
    environment = {"OMP_NUM_THREADS": str(args.threads), "GLOO_SOCKET_IFNAME": "lo"}
    if args.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    if args.memory == "kept":
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return environment


def run_rank(rank: int, num_ranks: int, port: int, args: argparse.Namespace, out: Path) -> None:
    """One worker process: joins the others, runs every case, and on rank 0 saves the results."""
    become_rank(rank, num_ranks, port)
    torch.set_num_threads(args.threads)
    mesh = Mesh.create(LauncherEnv.read(), device_type=args.device)
    shapes = [shape for shape in (TINY if args.quick else PUBLISHED) if args.only in shape.name]
    cases = make_cases(shapes, args.images, 8 if args.quick else TOKENS_PER_IMAGE)
    with torch.inference_mode():
        results = [run_case(case, mesh, args.repeats) for case in cases]
    if rank == 0:
        torch.save(results, out)
    mesh.close()


def run_case(case: Case, mesh: Mesh, repeats: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    placement = ExpertPlacement.contiguous(case.shape.num_experts, mesh.ep_size)
    experts = make_experts(case.shape, placement.experts_of(mesh.ep_rank), dtype, mesh.device)
    x_TD, *routing = make_input(case, mesh.rank, dtype, mesh.device)
    setup = Setup(case, mesh, placement, experts, *routing)
    layers = {name: build(setup) for name, build in CONTENDERS.items()}
    errors = {name: max(gathered(mesh, error)) for name, error in compare(layers, x_TD).items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"{case}: {name} differs from the naive loop by {error:.2e}")
    # Four times the rounds where one is short: medians of short times need them.
    rounds = repeats * (4 if case.presence == "sparse" else 1)
    start, all_work, own_work = time.perf_counter(), busy_core_seconds(), time.process_time()
    times = measure(layers | {"classic gate": classic_gate(setup)}, x_TD, mesh, rounds)
    own_work, all_work = sum(gathered(mesh, time.process_time() - own_work)), busy_core_seconds() - all_work
    disturbance = max(0.0, all_work - own_work) / (time.perf_counter() - start)
    report = summarise(case, mesh.world_size, times, errors) | {"cores_used_by_others": round(disturbance, 2)}
    if mesh.rank == 0:
        print(report["line"], flush=True)
    return report


def compare(layers: Mapping[str, Layer], x_TD: torch.Tensor) -> dict[str, float]:
    outputs = {name: layer(x_TD).float() for name, layer in layers.items()}
    reference = outputs["naive"]
    return {name: ((y - reference).norm() / reference.norm()).item() for name, y in outputs.items()}


def gathered(mesh: Mesh, value: T) -> list[T]:
    return mesh.world.gather_objects(value) if mesh.world is not None else [value]


def measure(
    layers: Mapping[str, Layer], x_TD: torch.Tensor, mesh: Mesh, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of the slowest rank per contender and round."""
    order = random.Random(0)  # the same on all ranks
    times: dict[str, list[float]] = {name: [] for name in layers}
    clock = cuda_milliseconds if mesh.device.type == "cuda" else cpu_milliseconds
    for round_ in range(warmup + rounds):
        for name in order.sample(list(layers), len(layers)):
            if mesh.world is not None:
                mesh.world.barrier()
            elapsed = clock(layers[name], x_TD)
            if round_ >= warmup:
                times[name].append(elapsed)
    by_rank = gathered(mesh, times)
    return {name: [max(ranks) for ranks in zip(*(times[name] for times in by_rank), strict=True)] for name in layers}


def cpu_milliseconds(layer: Layer, x_TD: torch.Tensor) -> float:
    start = time.perf_counter()
    layer(x_TD)
    return (time.perf_counter() - start) * 1e3


def cuda_milliseconds(layer: Layer, x_TD: torch.Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    layer(x_TD)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


if __name__ == "__main__":
    sys.exit(main())

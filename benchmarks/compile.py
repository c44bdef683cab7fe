"""What `model.compile` wins: one evaluation of the network, eager and compiled in turns, on one thread.

    python benchmarks/compile.py --config configs/demo.yaml --batch-sizes 8 50
    python benchmarks/compile.py --name DSMoE-S-E16 --batch-sizes 8 32 --repeats 3

One process, the same weights and inputs, each pair in the other order than the one before. Seconds are those of the
processor, so other processes disturb them little. Compiling is timed into an empty cache of its own. Page faults tell
how much memory the evaluations give back to the system and fetch again; what else takes that away is malloc's
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment, so run it with and without. Writes OUT.json.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from hardware import commit, conditions
from torch import Tensor

from moeca_dist import Engine
from moeca_dist.config import Config, load_config
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.blocks import EAGER, BlockParts

MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="configuration whose network is measured; or --name")
    parser.add_argument("--name", help="published size, with random weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="images; guidance doubles the rows")
    parser.add_argument("--repeats", type=int, default=10, help="pairs of evaluations (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/compile"), help="(default: %(default)s)")
    args = parser.parse_args()
    if (args.config is None) == (args.name is None):
        parser.error("state one of --config and --name")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    Engine.from_config(make_config(args, compiled=False))
    eager_s = time.perf_counter() - started
    started = time.perf_counter()
    model = Engine.from_config(make_config(args, compiled=True)).model
    compile_s = time.perf_counter() - started - eager_s
    facts = conditions("cpu") | {"commit": commit(), "command": " ".join(["python", *sys.argv])}
    result = {"conditions": facts, "malloc": {name: os.environ.get(name) for name in MALLOC}, "compile_s": compile_s}
    print(f"compiling {compile_s:.1f} s")
    parts = [block.parts for block in model.blocks]
    return result | {"rows": [row(model, parts, batch_size, args.repeats) for batch_size in args.batch_sizes]}


def make_config(args: argparse.Namespace, *, compiled: bool) -> Config:
    stated = ["model.device=cpu", f"model.compile={str(compiled).lower()}"]
    if args.config is not None:
        return load_config(args.config, stated)
    model = {"name": args.name, "random_init": True, "device": "cpu", "compile": compiled}
    return Config.model_validate({"model": model})


@torch.no_grad()
def row(model: DiffusionTransformer, parts: Sequence[BlockParts], batch_size: int, repeats: int) -> dict[str, Any]:
    spec, count = model.spec, 2 * batch_size
    inputs = (
        torch.randn(count, spec.in_channels, spec.input_size, spec.input_size),
        torch.full((count,), 0.5),
        torch.randint(spec.num_classes, (count,)),
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    faults, outputs = {False: 0, True: 0}, {False: inputs[0], True: inputs[0]}

    def evaluate(compiled: bool) -> Tensor:
        for block, part in zip(model.blocks, parts, strict=True):
            block.parts = part if compiled else EAGER
        return model(*inputs)

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for index in range(repeats + 1):  # the first pair warms up
        for compiled in (False, True) if index % 2 else (True, False):
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            outputs[compiled] = evaluate(compiled)
            seconds[compiled].append(time.process_time() - started)
            faults[compiled] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    eager, compiled_s = (seconds[which][1:] for which in (False, True))
    found = {
        "batch_size": batch_size,
        "eager_s": statistics.median(eager),
        "compiled_s": statistics.median(compiled_s),
        "ratio": statistics.median(a / b for a, b in zip(eager, compiled_s, strict=True)),
        "page_faults": {"eager": faults[False], "compiled": faults[True]},
        "relative_l2": float((outputs[True] - outputs[False]).norm() / outputs[False].norm()),
        "recompiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
    }
    print(found)
    return found


if __name__ == "__main__":
    raise SystemExit(main())

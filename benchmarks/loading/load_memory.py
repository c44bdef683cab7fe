"""How much memory loading a published-size checkpoint takes, per rank, for several expert-parallel sizes.

    python -m benchmarks.loading.load_memory [--model DSMoE-B-E16] [--ep-sizes 1 2 4] [--folder TMP]

Writes a random fp32 checkpoint as a training run saves it ({"model", "ema", "args"}), loads each rank's part in a
fresh process without any process group, and reports resident expert bytes and peak memory. Memory mapped from the
checkpoint (RssFile) can be dropped by the kernel at any time; the process's own (RssAnon) cannot. The baseline reads
the whole file and copies it into the whole model. The temporary files are deleted at the end.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.hardware import command, commit, cpu_model
from benchmarks.common.results import OUT_HELP, default_folder, save
from moeca_dist import __version__
from moeca_dist.checkpoints.convert import convert
from moeca_dist.checkpoints.load import load_model
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.models.registry import FAMILIES, build_model, count_parameters, original_shapes, published_spec
from moeca_dist.parallel.mesh import Mesh

MIB = 2**20
SAMPLE_S = 0.001
TOLERANCE = 0.02


class PeakMemory:
    """Samples this process's resident memory in the background: at the start and at its peak, by kind, in bytes."""

    def __init__(self) -> None:
        self.start = _resident()
        self.peak = dict(self.start)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            now = _resident()
            self.peak = {name: max(self.peak[name], now[name]) for name in now}


def _resident() -> dict[str, int]:
    """VmRSS and its parts in bytes (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssFile")}


# ---- steps, each in a process of its own -----------------------------------------------------------------------------


def write_checkpoint(model: str, path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = original_shapes(published_spec(model))
    weights = {
        name: {key: torch.randn(shape, generator=draw) * 0.02 for key, shape in shapes.items()}
        for name in ("model", "ema")
    }
    torch.save(weights | {"args": argparse.Namespace(model=model, global_seed=0)}, path)


def measure(loader: str, model_name: str, path: Path, ep_size: int, rank: int) -> dict[str, Any]:
    mesh = Mesh(rank, ep_size, ep_size, torch.device("cpu"), None, None, None)
    with PeakMemory() as memory:
        model = load_whole(model_name, path) if loader == "whole" else load_model(path, mesh=mesh)
    experts = [weight for _, layer in model.moe_layers() for weight in layer.experts.parameters()]
    return {
        "loader": loader,
        "ep_size": ep_size,
        "rank": rank,
        "expert_bytes": _bytes(experts),
        "model_bytes": _bytes([*model.parameters(), *model.buffers()]),
        "start_rss": memory.start["VmRSS"],
        "peak_rss": memory.peak["VmRSS"],
        "peak_anon_added": memory.peak["RssAnon"] - memory.start["RssAnon"],
        "peak_file_added": memory.peak["RssFile"] - memory.start["RssFile"],
        "settled_rss": _resident()["VmRSS"],
    }


def load_whole(model_name: str, path: Path) -> DiffusionTransformer:
    """The baseline: read all of the file, build all of the model, copy one into the other."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    spec = published_spec(model_name)
    model, family = build_model(spec), FAMILIES[spec.family]
    for block in spec.moe_blocks:
        for weight, projection in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            keys = [family.expert_key(block, expert, projection) for expert in range(spec.num_experts)]
            state[f"{family.experts_prefix(block)}.{weight}"] = torch.stack([state.pop(key) for key in keys])
    model.load_state_dict(state)
    return model.eval()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def worker(step: str, arguments: list[str]) -> None:
    # The first network on the meta device makes torch import 70 MiB of modules of its own: not part of loading.
    original_shapes(published_spec("DSMoE-S-E16"))
    match step, arguments:
        case "write", [model, path]:
            write_checkpoint(model, Path(path))
        case "convert", [source, target]:
            with PeakMemory() as memory:
                convert(source, target)
            added = {name: memory.peak[name] - memory.start[name] for name in memory.peak}
            print(json.dumps({"peak_anon_added": added["RssAnon"], "peak_file_added": added["RssFile"]}))
        case "measure", [loader, model, path, ep_size, rank]:
            print(json.dumps(measure(loader, model, Path(path), int(ep_size), int(rank))))
        case _:
            raise SystemExit(f"unknown step {step} {arguments}")


def in_process(step: str, *arguments: object) -> dict[str, Any]:
    """Run one step in a fresh interpreter and return what it printed last."""
    worker = [sys.executable, "-m", "benchmarks.loading.load_memory", "--step", step, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    finished = subprocess.run(worker, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = finished.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


# ---- the whole run and its report ------------------------------------------------------------------------------------


def run(model: str, ep_sizes: Sequence[int], folder: Path | None) -> dict[str, Any]:
    spec = published_spec(model)
    with tempfile.TemporaryDirectory(prefix="load-memory-", dir=folder) as temporary:
        file, sharded = Path(temporary) / "0700000.pt", Path(temporary) / "sharded"
        in_process("write", model, file)
        conversion = in_process("convert", file, sharded)
        rows: list[dict[str, Any]] = []
        for loader, path in (("pt", file), ("sharded", sharded)):
            rows += [
                in_process("measure", loader, model, path, ep_size, rank)
                for ep_size in ep_sizes
                for rank in range(ep_size)
            ]
        rows.append(in_process("measure", "whole", model, file, 1, 0))
        file_bytes = file.stat().st_size
    all_experts = 3 * spec.hidden_size * spec.expert_width * spec.num_experts * len(spec.moe_blocks) * 4
    for row in rows:
        row["expert_share_error"] = row["expert_bytes"] * row["ep_size"] / all_experts - 1
    return {
        "model": model,
        "parameters": count_parameters(spec)[0],
        "file_bytes": file_bytes,
        "all_expert_bytes": all_experts,
        "conditions": conditions(),
        "conversion": conversion,
        "ranks": rows,
    }


def conditions() -> dict[str, Any]:
    return {
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {"moeca_dist": __version__}
        | {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        "commit": commit(),
        "page_cache": "warm: the file has just been written",
    }


def markdown(result: dict[str, Any]) -> str:
    conditions = result["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    table = [
        "| loader | EP | rank | expert MiB | of total / EP | model MiB | peak RssAnon added | peak RssFile added "
        "| peak RSS |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['loader']} | {row['ep_size']} | {row['rank']} | {row['expert_bytes'] / MIB:.1f} "
            f"| {1 + row['expert_share_error']:.4f} | {row['model_bytes'] / MIB:.1f} "
            f"| {row['peak_anon_added'] / MIB:.0f} | {row['peak_file_added'] / MIB:.0f} "
            f"| {row['peak_rss'] / MIB:.0f} |"
            for row in result["ranks"]
        ),
    ]
    start = min(row["start_rss"] for row in result["ranks"]) / MIB
    return "\n".join(
        [
            f"# Memory while loading {result['model']}",
            "",
            f"{result['parameters'] / 1e6:.1f}M parameters in fp32; the file holds them twice (`model` and `ema`): "
            f"{result['file_bytes'] / MIB:.0f} MiB. All routed experts: {result['all_expert_bytes'] / MIB:.1f} MiB.",
            f"Each rank loads alone in a fresh process, which holds {start:.0f} MiB before (Python, torch, deepspeed, "
            "all modules imported). `whole` is the baseline: `torch.load` without mmap, the whole model, "
            "`load_state_dict`. `pt` and `sharded` are `load_model`, from the file and from the folder that "
            "`moeca convert` made of it.",
            "RssAnon is memory of the process; RssFile is mapped from the checkpoint, shared by the ranks of a machine "
            "and dropped by the kernel when it needs the room. Sizes in MiB.",
            "",
            *table,
            "",
            f"Converting the file to 8 shards adds {result['conversion']['peak_anon_added'] / MIB:.0f} MiB of RssAnon "
            f"(and {result['conversion']['peak_file_added'] / MIB:.0f} MiB of RssFile) at its peak.",
            "",
            f"`{conditions['command']}`, {conditions['date']}; {conditions['processor']}, "
            f"{conditions['memory_bytes'] / 2**30:.0f} GiB; {conditions['system']}; {versions}; "
            f"commit {conditions['commit']}; "
            f"page cache {conditions['page_cache']}; memory sampled every {1000 * SAMPLE_S:.0f} ms.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DSMoE-B-E16", help="published size")
    parser.add_argument("--ep-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="where the temporary files go (3.5 GiB for DSMoE-B-E16)")
    parser.add_argument("--out", type=Path, default=default_folder("load_memory"), help=OUT_HELP)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        worker(arguments.step[0], arguments.step[1:])
        return
    result = run(arguments.model, arguments.ep_sizes, arguments.folder)
    save(arguments.out, result, markdown(result))
    print(markdown(result))
    wrong = [row for row in result["ranks"] if abs(row["expert_share_error"]) > TOLERANCE]
    if wrong:
        raise SystemExit(f"resident expert bytes are off by more than {TOLERANCE:.0%}: {wrong}")


if __name__ == "__main__":
    main()

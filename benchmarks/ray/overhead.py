"""What Ray costs: images/s of one gang of one rank against the plain engine, and a supervisor with a million requests.

    python -m benchmarks.ray.overhead [--num-images 3000] [--repeats 2] [--requests 1000000]

Both sides generate the same images with the shipped model, in alternating order, each in fresh processes. Starting Ray
and loading the model count on neither side: the plain engine is timed from the first request to the last image written,
the batch from the record of its first chunk to that of its last (files flushed to the disk, each with its checksum).
Memory is what is resident while a supervisor gives out every chunk of a job. About ten minutes a run on two idle cores,
so forty with the defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.hardware import REPOSITORY, conditions
from benchmarks.common.results import OUT_HELP, default_folder, save
from moeca_dist.ray_batch.jobs import LabelCycle
from moeca_dist.ray_batch.ledger import Plan
from moeca_dist.ray_batch.manifest import MANIFEST, read_records
from moeca_dist.ray_batch.supervisor import Supervisor

CHUNK = 50
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=3000)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=default_folder("ray_overhead"), help=OUT_HELP)
    args = parser.parse_args()
    facts = conditions("cpu")
    rates: dict[str, list[float]] = {"plain": [], "batch": []}
    for repeat in range(args.repeats):
        for side in ("plain", "batch") if repeat % 2 == 0 else ("batch", "plain"):
            rates[side].append(measure(side, args.num_images, args.num_steps))
            print(f"{side}: {rates[side][-1]:.3f} images/s", flush=True)
    memory = supervisor_memory(args.requests)
    result = {
        "conditions": facts,
        "num_images": args.num_images,
        "num_steps": args.num_steps,
        "images_per_s": rates,
        "ratio": statistics.median(rates["batch"]) / statistics.median(rates["plain"]),
        "supervisor": memory,
    }
    save(args.out, result, render(result))
    print(render(result))


def measure(side: str, num_images: int, num_steps: int) -> float:
    """Images/s of one run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        script = ["launch/generate.py"] if side == "plain" else ["launch/ray_generate.py", "--address", "local"]
        command = [*script, "--config", "configs/demo.yaml", "--num-images", str(num_images), "--out", str(out)]
        command += ["--set", f"sampling.num_steps={num_steps}", "--set", f"sampling.batch_size={CHUNK}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, check=True, capture_output=True)
        if side == "plain":
            return float(json.loads((out / "report.json").read_text())["images_per_s"])
        return batch_rate(out)


def batch_rate(out: Path) -> float:
    """From the records: images after the first chunk over the time from its record to the last.

    The first chunk ends when its gang has long been up, so what lies between is all the work of a running batch.
    """
    chunks = [record for record in read_records(out / MANIFEST) if record["kind"] == "chunk"]
    return sum(chunk["count"] for chunk in chunks[1:]) / (chunks[-1]["time"] - chunks[0]["time"])


def supervisor_memory(num_requests: int) -> dict[str, Any]:
    """Resident memory of this process while a supervisor gives out every chunk and takes it back as failed or done.

    Chunks are marked as done without files: what is measured is what the supervisor holds, not the disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = LabelCycle(num_requests, [range(10)], 0)
        plan = Plan(Path(folder), source, num_requests, CHUNK, 3, {"requests": source.identity()})
        supervisor = Supervisor(plan)
        supervisor.begin(gangs=1)  # type: ignore[operator]  # called here, and not by an actor's handle
        samples, began = [], time.perf_counter()
        every = max(1, plan.num_chunks // 20)
        given = 0
        while (chunk := supervisor.lease(frozenset())) is not None:
            supervisor._ledger.complete(chunk.id)
            if given % every == 0:
                samples.append((given * CHUNK, psutil.Process().memory_info().rss / MIB))
            given += 1
        seconds = time.perf_counter() - began
        samples.append((num_requests, psutil.Process().memory_info().rss / MIB))
    return {
        "requests": num_requests,
        "chunks": given,
        "seconds": seconds,
        "rss_mib": [{"requests": requests, "mib": round(mib, 2)} for requests, mib in samples],
        "growth_mib": samples[-1][1] - samples[0][1],
    }


def render(result: dict[str, Any]) -> str:
    facts, memory, rates = result["conditions"], result["supervisor"], result["images_per_s"]
    rows = "\n".join(
        f"| {name} | {statistics.median(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |"
        for name, values in rates.items()
    )
    return f"""# What Ray costs

`{facts["command"]}`, {facts["date"]}, commit {facts["commit"]}, {facts["device"]}, {facts["cores"]} cores, load average
at the start {facts["load_average_1min"]}. The shipped model, {result["num_images"]} images in {result["num_steps"]}
steps, batches of {CHUNK}, one thread per rank.

| | images/s, median | runs |
|---|---|---|
{rows}

One gang of one rank through Ray reaches **{100 * result["ratio"]:.1f}%** of the plain engine. The plain
engine's time runs from the first request to the last image written; the batch's from the record of its first chunk to
that of its last.

A supervisor that gives out {memory["requests"]:,} requests in {memory["chunks"]:,} chunks:
{memory["rss_mib"][0]["mib"]} MiB resident at the start, {memory["rss_mib"][-1]["mib"]} MiB at the end (growth
{memory["growth_mib"]:.2f} MiB), in {memory["seconds"]:.1f} s.
"""


if __name__ == "__main__":
    main()

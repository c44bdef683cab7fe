"""From a killed rank to its gang generating again: one long batch on two raylets, hit once it works, again and again.

    python -m benchmarks.ray.recovery [--kills 20] [--seed 0]

Rank 0, rank 1 and the whole gang in turn, while a second gang goes on generating on the same cores. The next kill waits
until the gang has recovered. Writes OUT/data.json and table.md. About twenty seconds a kill.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.hardware import conditions
from benchmarks.common.results import OUT_HELP, default_folder, save
from benchmarks.ray.chaos import BatchRun, Blow, Target, TwoRaylets, strike, wait_for

# More than can be generated while this runs.
ARGUMENTS = ["--config", "configs/demo.yaml", "--num-images", "100000", "--gangs", "2", "--gang-size", "2"]
ARGUMENTS += ["--set", "sampling.batch_size=4"]
TARGETS: tuple[Target, ...] = ("rank 0", "rank 1", "gang")
START_TIMEOUT_S = 120.0
RECOVERY_TIMEOUT_S = 300.0
PAUSE_S = (1.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=default_folder("ray_recovery"), help=OUT_HELP)
    args = parser.parse_args()
    facts = conditions("cpu")
    with tempfile.TemporaryDirectory(prefix="moeca-recovery-") as folder, TwoRaylets() as cluster:
        run = BatchRun(cluster.address, Path(folder) / "out", ARGUMENTS)
        try:
            kills = measure(cluster, run, args.kills, random.Random(args.seed))
        finally:
            run.end()
    save(args.out, {"conditions": facts, "kills": kills}, render(facts, kills))
    print(render(facts, kills))


def measure(cluster: TwoRaylets, run: BatchRun, count: int, draw: random.Random) -> list[dict[str, Any]]:
    kills: list[dict[str, Any]] = []
    if not wait_for(lambda: all(run.find(f"gang {gang} is ready") for gang in (0, 1)), START_TIMEOUT_S, run):
        sys.exit(f"error: the gangs did not start:\n{run.log}")
    for number in range(count):
        time.sleep(draw.uniform(*PAUSE_S))
        blow = strike(cluster, run, TARGETS[number % len(TARGETS)], "chunk")
        if blow is None:
            sys.exit(f"error: there was nothing to kill:\n{run.log}")
        kills.append(recovery(run, blow))
        print(f"{blow.target} of gang {blow.gang}: {kills[-1]['recovered_s']:.1f} s", flush=True)
    return kills


def recovery(run: BatchRun, blow: Blow) -> dict[str, Any]:
    """Seconds from the kill to each step of the way back."""
    gang = f"gang {blow.gang}"
    if not wait_for(lambda: run.find(f"{gang} generates again", since=blow.at), RECOVERY_TIMEOUT_S, run):
        sys.exit(f"error: {gang} did not come back:\n{run.log}")
    steps = {
        "noticed_s": "was lost",
        "started_s": "starts on",
        "ready_s": "is ready",
        "recovered_s": "generates again",
    }
    # A gang may fail to start and be tried again: the last time counts.
    moments = {name: run.find(f"{gang} {said}", since=blow.at)[-1][0] - blow.at for name, said in steps.items()}
    return {"target": blow.target, "gang": blow.gang} | moments


def render(facts: dict[str, Any], kills: list[dict[str, Any]]) -> str:
    lines = [
        "# From a killed rank to its gang generating again",
        "",
        f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}, {facts['device']}, {facts['cores']} cores, "
        f"load average at the start {facts['load_average_1min']}.",
        "",
        f"{len(kills)} kills (SIGKILL) in one batch on 2 gangs x 2 ranks; the other gang works on the same cores. "
        "Seconds since the kill:",
        "",
        "| | median | worst |",
        "|---|---|---|",
    ]
    names = {
        "noticed_s": "the loss is noticed",
        "started_s": "new processes are there",
        "ready_s": "the model is loaded and the ranks have met",
        "recovered_s": "the gang generates again",
    }
    for key, name in names.items():
        values = [kill[key] for kill in kills]
        lines.append(f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Batches on a two-raylet cluster while their processes are killed at random: does every image come out right, once?

    python -m benchmarks.ray.soak [--kills 200] [--seed 0]

Every batch gets up to eight kills of its ranks, gangs, a raylet, its supervisor and at most one of its driver, at
start, in mid-chunk and during commit, all drawn at random; it must then end with exit code 0 after at most one
--resume, and its images, checksums and manifest are compared with a plain two-rank run. Writes OUT/data.json and
table.md. About ten seconds a kill on two idle cores.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.hardware import conditions
from benchmarks.common.results import OUT_HELP, default_folder, save
from benchmarks.ray.chaos import (
    PHASES,
    TARGETS,
    BatchRun,
    Blow,
    Phase,
    Target,
    TwoRaylets,
    note_recovery,
    plain_run,
    problems,
    strike,
)

NUM_IMAGES = 320
KILLS_PER_BATCH = 8
END_TIMEOUT_S = 900
# Between two kills: some hit a gang that is still starting, most one that works.
PAUSE_S = (0.0, 2.0)
ARGUMENTS = ["--config", "configs/demo.yaml", "--num-images", str(NUM_IMAGES)]
ARGUMENTS += ["--set", "sampling.num_steps=6", "--set", "sampling.batch_size=4"]


@dataclass
class Outcome:
    """One batch: its kills, how often it was resumed, and what was wrong with its results."""

    kills: list[Blow] = field(default_factory=list)
    resumes: int = 0
    exit_code: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=default_folder("ray_soak"), help=OUT_HELP)
    args = parser.parse_args()
    facts = conditions("cpu")
    folder = Path(tempfile.mkdtemp(prefix="moeca-soak-"))
    outcomes: list[Outcome] = []
    try:
        plain_run(folder / "plain", ARGUMENTS)
        draw = random.Random(args.seed)
        while (left := args.kills - sum(len(outcome.kills) for outcome in outcomes)) > 0:
            # A fresh cluster now and then: each raylet that was killed leaves files behind.
            with TwoRaylets() as cluster:
                for _ in range(5):
                    if left <= 0:
                        break
                    outcome = soak(cluster, folder, draw, min(left, KILLS_PER_BATCH))
                    outcomes.append(outcome)
                    left -= len(outcome.kills)
                    print(f"{args.kills - left} kills; {outcome.seconds:.0f} s, exit {outcome.exit_code}", flush=True)
                    write(args.out, facts, outcomes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if all(sound(outcome) for outcome in outcomes) else 1)


def soak(cluster: TwoRaylets, folder: Path, draw: random.Random, kills: int) -> Outcome:
    outcome, out = Outcome(), folder / "batch"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [*ARGUMENTS, "--gangs", "2", "--gang-size", "2"]
    began = time.monotonic()
    run = BatchRun(cluster.address, out, arguments)
    try:
        while len(outcome.kills) < kills:
            target, phase = draw_blow(draw, driver_allowed=outcome.resumes == 0)
            blow = strike(cluster, run, target, phase)
            if blow is None:
                break
            outcome.kills.append(blow)
            if target == "driver":
                note_all(run, outcome)
                run.wait(END_TIMEOUT_S)
                outcome.resumes += 1
                run = BatchRun(cluster.address, out, [*arguments, "--resume"])
            time.sleep(draw.uniform(*PAUSE_S))
        outcome.exit_code = run.wait(END_TIMEOUT_S)
        note_all(run, outcome)
        if outcome.exit_code and not outcome.resumes:
            outcome.resumes += 1
            run = BatchRun(cluster.address, out, [*arguments, "--resume"])
            outcome.exit_code = run.wait(END_TIMEOUT_S)
        if outcome.exit_code:
            outcome.problems.append(run.log[-2000:])
        else:
            outcome.problems = problems(out, folder / "plain", NUM_IMAGES)
    except TimeoutError as error:
        outcome.exit_code, outcome.problems = -1, [str(error)[-2000:]]
    finally:
        run.end()
    outcome.seconds = time.monotonic() - began
    return outcome


def draw_blow(draw: random.Random, *, driver_allowed: bool) -> tuple[Target, Phase]:
    targets = [target for target in TARGETS if target != "driver" or driver_allowed]
    phase = draw.choice(PHASES)
    if phase == "start":
        # Only at the beginning or after another kill is there anything that starts: ask for it less often.
        phase = draw.choice(PHASES)
    return draw.choice(targets), phase


def note_all(run: BatchRun, outcome: Outcome) -> None:
    for blow in outcome.kills:
        if blow.recovery_s is None:
            note_recovery(run, blow)


def sound(outcome: Outcome) -> bool:
    return outcome.exit_code == 0 and not outcome.problems and outcome.resumes <= 1


def write(out: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    blows = [blow for outcome in outcomes for blow in outcome.kills]
    # A gang that was hit again before it worked counts from its last kill.
    recoveries = [blow.recovery_s for blow in blows if blow.recovery_s is not None and blow.target != "raylet"]
    summary = {
        "kills": len(blows),
        "batches": len(outcomes),
        "images": NUM_IMAGES * len(outcomes),
        "sound_batches": sum(sound(outcome) for outcome in outcomes),
        "resumed_batches": sum(outcome.resumes > 0 for outcome in outcomes),
        "minutes": sum(outcome.seconds for outcome in outcomes) / 60,
        "recoveries": len(recoveries),
        "recovery_median_s": statistics.median(recoveries) if recoveries else None,
        "recovery_worst_s": max(recoveries, default=None),
    }
    content = {"conditions": facts, "summary": summary, "batches": [asdict(outcome) for outcome in outcomes]}
    save(out, content, render(facts, summary, blows, outcomes))


def render(facts: dict[str, Any], summary: dict[str, Any], blows: list[Blow], outcomes: list[Outcome]) -> str:
    counts = Counter((blow.target, blow.phase) for blow in blows)
    lines = [
        "# Batches under fire",
        "",
        f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}, {facts['device']}, {facts['cores']} cores, "
        f"load average at the start {facts['load_average_1min']}.",
        "",
        f"{summary['kills']} kills (SIGKILL) in {summary['batches']} batches of {NUM_IMAGES} images on 2 gangs x 2 "
        f"ranks, two raylets on one machine, {summary['minutes']:.0f} minutes. {summary['sound_batches']} of "
        f"{summary['batches']} batches ended with exit code 0 after at most one `--resume` "
        f"({summary['resumed_batches']} were resumed), every index exactly once, byte for byte the images of a plain "
        "two-rank run, no temporary files, checksums right.",
        "",
    ]
    if summary["recoveries"]:
        lines += [
            f"From the kill of a rank or gang to its gang's next denoising step: median "
            f"{summary['recovery_median_s']:.1f} s, worst {summary['recovery_worst_s']:.1f} s "
            f"({summary['recoveries']} recoveries; a gang that was hit again while it started counts for each kill).",
            "",
        ]
    lines += ["| killed | " + " | ".join(PHASES) + " |", "|---|" + "---|" * len(PHASES)]
    lines += [
        f"| {target} | " + " | ".join(str(counts[target, phase]) for phase in PHASES) + " |" for target in TARGETS
    ]
    failed = [outcome for outcome in outcomes if not sound(outcome)]
    if failed:
        lines += ["", "## What went wrong", ""]
        lines += [f"- exit {outcome.exit_code}: {' / '.join(outcome.problems)[:500]}" for outcome in failed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

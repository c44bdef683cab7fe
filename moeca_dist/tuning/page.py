"""What a tuning run says for people: what was chosen and why, each figure beside the images it was measured on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moeca_dist.tuning.candidate import Figures, Trial
from moeca_dist.tuning.schedules import num_full
from moeca_dist.tuning.tune import Comparison, Tuned


def page(tuned: Tuned, config: Path, calibration: Path, plot: Path) -> str:
    """Markdown; the paths are links beside it."""
    parts = [f"# Tuned for {tuned.settings.target}", _choice(tuned), _figures(tuned), _comparison(tuned.comparisons)]
    parts += [_others(tuned), f"![quality against FLOPs, and where the full steps sit]({plot.name})"]
    parts += [f"Files: [{config.name}]({config.name}), [{calibration.name}]({calibration.name})."]
    return "\n\n".join(parts) + "\n"


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both FLOPs and mean closeness, fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda each: (-each.speedup, -each.mean_db)):
        if not front or trial.mean_db > front[-1].mean_db:
            front.append(trial)
    return front


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _choice(tuned: Tuned) -> str:
    candidate = tuned.chosen.candidate
    halves = [", ".join(str(step) for step in steps) for steps in candidate.schedule]
    num_steps = len(tuned.calibration.weights.steps)
    where = f"steps {halves[0]}"
    if len(halves) == 2:
        where = f"conditional half: steps {halves[0]}; unconditional half: steps {halves[1]}"
    at_equal = [
        f"{trial.candidate.policy} of order {trial.candidate.order}: {trial.mean_db:.2f} dB at {trial.speedup:.2f}x"
        for trial in _best_by_policy(tuned)
    ]
    return (
        f"Policy `{candidate.policy}` with a forecast of order {candidate.order}, "
        f"{num_full(candidate.schedule)} of {num_steps * len(halves)} evaluations full ({where}), with "
        f"calibrated output weights. Schedules with {tuned.num_searches} numbers of full steps were searched by proxy "
        f"on recorded exact outputs, and {len(tuned.trials)} candidates run for real; of those that meet the target "
        "this one is "
        f"{'the closest to the exact images' if tuned.settings.target.kind == 'speedup' else 'the fastest'}. "
        f"The best of each policy at {_least_speedup(tuned):.2f}x or more: {'; '.join(at_equal)}."
    )


def _least_speedup(tuned: Tuned) -> float:
    target = tuned.settings.target
    return target.value if target.kind == "speedup" else tuned.chosen.speedup


def _best_by_policy(tuned: Tuned) -> Iterator[Trial]:
    enough = [trial for trial in tuned.trials if trial.speedup >= _least_speedup(tuned)]
    for policy in sorted({trial.candidate.policy for trial in enough}):
        yield max((trial for trial in enough if trial.candidate.policy == policy), key=lambda trial: trial.mean_db)


def _figures(tuned: Tuned) -> str:
    seed, count = tuned.settings.seed, tuned.settings.num_images
    rows = [
        ("predicted by the proxy", seed, tuned.predicted),
        ("confirmed by a real run, fitted on", seed, tuned.chosen),
    ]
    if tuned.checked is not None:
        rows.append(("checked", seed + 1, tuned.checked))
    rows.append(("**held out**", seed + 2, tuned.held_out))
    head = ["", f"{count} images of seed", "mean", "95% of all images exceed", "FLOPs"]
    lines = ([name, str(number), *_cells(figures)] for name, number, figures in rows)
    text = table(head, lines)
    if tuned.settings.target.kind == "psnr":
        share = tuned.held_out.share_above(tuned.settings.target.value)
        text += f"\n\n{share:.1%} of the held-out images have {tuned.settings.target.value:g} dB or more."
    return text + (
        "\n\nThe 95% are a one-sided tolerance bound with 90% confidence for normally distributed values: it lies "
        "below what 95% of so few images exceed."
    )


def _cells(figures: Figures) -> list[str]:
    return [f"{figures.mean_db:.2f} dB", f"{figures.bound_db:.2f} dB", f"{figures.speedup:.2f}x fewer"]


def _comparison(comparisons: Sequence[Comparison]) -> str:
    rows = (
        [
            each.name,
            f"{each.plain.speedup:.2f}x",
            f"{each.plain.mean_db:.2f} dB",
            "none" if each.calibrated is None else f"{each.calibrated.mean_db:.2f} dB",
        ]
        for each in comparisons
    )
    head = ["schedule", "FLOPs", "plain guidance", "calibrated"]
    return "On the held-out images, each with a calibration of its own:\n\n" + table(head, rows)


def _others(tuned: Tuned) -> str:
    rows = (
        [
            f"`{trial.candidate.policy}` {trial.candidate.order}" + (" (chosen)" if trial == tuned.chosen else ""),
            " + ".join(str(len(steps)) for steps in trial.candidate.schedule),
            f"{trial.speedup:.2f}x",
            f"{trial.mean_db:.2f} dB",
            f"{trial.bound_db:.2f} dB",
        ]
        for trial in pareto(tuned.trials)
    )
    head = ["policy, order", "full steps", "FLOPs", "mean", "95% exceed"]
    return "All real runs that no other beats, on the images they were fitted on:\n\n" + table(head, rows)

"""The figure of a tuning run: quality against FLOPs, and where the chosen full steps sit."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moeca_dist.cache.policy import HALVES
from moeca_dist.tuning.candidate import ORDERS
from moeca_dist.tuning.page import pareto
from moeca_dist.tuning.tune import Tuned


def plot(tuned: Tuned, path: Path) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(4, 1))
    for policy, _ in ORDERS:
        trials = [trial for trial in tuned.trials if trial.candidate.policy == policy]
        above.scatter([each.speedup for each in trials], [each.mean_db for each in trials], s=14, label=policy)
    front = pareto(tuned.trials)
    above.plot([each.speedup for each in front], [each.mean_db for each in front], lw=0.8, color="grey")
    chosen = tuned.chosen
    above.scatter([chosen.speedup], [chosen.mean_db], s=120, marker="*", color="black", label="chosen")
    above.scatter([chosen.speedup], [tuned.held_out.mean_db], s=60, marker="x", color="black", label="held out")
    above.set(xlabel="times fewer FLOPs", ylabel="closeness to the exact images, dB")
    above.legend()
    for row, steps in enumerate(chosen.candidate.schedule):
        below.scatter(steps, [row] * len(steps), s=30, marker="|")
    names = HALVES[: len(chosen.candidate.schedule)]
    below.set_yticks(range(len(names)), names)
    below.set(xlabel="full steps", xlim=(-1, len(tuned.calibration.weights.steps)), ylim=(len(names) - 0.5, -0.5))
    figure.savefig(path, dpi=110, format="png")

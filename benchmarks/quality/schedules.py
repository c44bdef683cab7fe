"""Tuned against hand-set and uniform full steps on the shipped model, with plain guidance and calibrated.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.schedules --tuned configs/tuned/demo_balanced.yaml

Every schedule runs under the tuned file's policy and gets a calibration of its own, fitted on images of one seed;
figures are of other seeds, which the tuning did not see either.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.common.results import OUT_HELP, TABLE, default_folder
from moeca_dist import Engine
from moeca_dist.calibration.correction import OutputWeights
from moeca_dist.config import CacheConfig, HalvesConfig
from moeca_dist.tuning.candidate import Figures
from moeca_dist.tuning.page import table
from moeca_dist.tuning.schedules import Schedule, even, num_full
from moeca_dist.tuning.trials import ImageSet, Trials, image_set
from moeca_dist.types import Request

FIT_SEED = 7
HAND_SET = (0, 1, 4, 9, 15, 22, 29, 35, 40, 44, 47)
# Searched with single real runs of moeca_forecast, without calibration (benchmarks/quality/search_schedule.py).
SEARCHED = (0, 4, 6, 11, 16, 21, 27, 33, 39, 44, 48)


def schedules(tuned: CacheConfig, num_steps: int) -> dict[str, Schedule]:
    assert isinstance(tuned.full_steps, HalvesConfig)
    chosen: Schedule = (tuple(tuned.full_steps.conditional), tuple(tuned.full_steps.unconditional))
    every_fifth = tuple(range(0, num_steps, 5))
    return {
        "tuned": chosen,
        "uniform, as many": even(num_full(chosen), num_steps, 2),
        "uniform, every 5": (every_fifth, every_fifth),
        "hand-set": (HAND_SET, HAND_SET),
        "searched, both halves alike": (SEARCHED, SEARCHED),
    }


def measured(trials: Trials, cache: CacheConfig, weights: OutputWeights | None, sets: list[ImageSet]) -> Figures:
    parts = [trials.measured(cache, weights, images) for images in sets]
    return Figures(parts[0].speedup, tuple(db for part in parts for db in part.db))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=default_folder("schedules"), help=OUT_HELP)
    parser.add_argument("--num-images", type=int, default=40, help="to fit on, and of each held-out seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[201, 301])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    engine = Engine.from_config(args.tuned)

    def requests(seed: int) -> list[Request]:
        return [Request(index, index % 10, seed) for index in range(args.num_images)]

    tuned = engine.config.cache.model_copy(update={"calibration": None})
    trials = Trials.open(engine.without_cache(), requests(FIT_SEED), FIT_SEED, None)
    sets = [image_set(engine, requests(seed)) for seed in args.seeds]
    rows = []
    for name, (conditional, unconditional) in schedules(tuned, engine.num_steps).items():
        halves = HalvesConfig(conditional=list(conditional), unconditional=list(unconditional))
        cache = tuned.model_copy(update={"full_steps": halves})
        plain = measured(trials, cache, None, sets)
        calibrated = measured(trials, cache, trials.fitted(cache).fitted.weights, sets)
        count = f"{len(conditional)} + {len(unconditional)}"
        db = [f"{figures.mean_db:.2f} dB" for figures in (plain, calibrated)]
        rows.append([name, count, f"{plain.speedup:.2f}x", *db, f"{calibrated.bound_db:.2f} dB"])
        print(" | ".join(rows[-1]), flush=True)
    seeds = ", ".join(str(seed) for seed in args.seeds)
    head = ["schedule", "full steps", "FLOPs", "plain guidance", "calibrated", "95% exceed, calibrated"]
    text = f"{args.num_images} images of each of the seeds {seeds}; policy `{tuned.policy}` of order {tuned.order}.\n\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / TABLE).write_text(text + table(head, iter(rows)) + "\n")


if __name__ == "__main__":
    main()

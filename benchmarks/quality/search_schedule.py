"""Where the full steps of the demo's default policy sit: coordinate search from a given start, on its own seed.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.search_schedule --conditional 0,1,4,11,17,23,28,33,39,43,48

The number of full steps stays; single steps move by a few places, for both guidance halves together or, with
``--unconditional``, for each on its own. A move is kept if it raises the mean PSNR against the exact images of the same
noise. Prints the best lists and their PSNR on the search seed; judge them on other seeds (``pareto.py``).
"""

import argparse
import random
import time

import torch
from torch import Tensor

from moeca_dist import load_model
from moeca_dist.cache.policies.registry import build_policy
from moeca_dist.cache.session import CacheSession
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.config import CacheConfig, HalvesConfig
from moeca_dist.demo.model_card import SHIPPED_CHECKPOINT
from moeca_dist.evaluation.paired import psnr_db, squared_error, unit_images
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.sampling.guidance import cached, exact
from moeca_dist.sampling.sampler import sampler_for
from moeca_dist.types import Request

NUM_STEPS, CFG_SCALE = 50, 1.5
SHIFTS = (-5, -3, -2, -1, 1, 2, 3, 5)

Schedule = tuple[tuple[int, ...], ...]


class Objective:
    """Mean PSNR in dB of a schedule over a fixed batch of images."""

    def __init__(self, model: DiffusionTransformer, num_images: int, seed: int) -> None:
        self.model = model
        self.requests = [Request(index, index % 10, seed) for index in range(num_images)]
        self.sampler = sampler_for(model.spec)
        self.reference = unit_images(self._sample(exact(model)))

    def __call__(self, schedule: Schedule) -> float:
        policy = build_policy(config_of(schedule), NUM_STEPS, guided=True)
        assert policy is not None
        spec = self.model.spec
        session = CacheSession(
            policy,
            self.requests,
            guided=True,
            num_blocks=spec.depth,
            num_experts=spec.num_experts,
            statistics=CacheStatistics(),
        )
        images = unit_images(self._sample(cached(self.model, session)))
        return float(psnr_db(squared_error(images, self.reference)).mean())

    def _sample(self, network: object) -> Tensor:
        return self.sampler.sample(network, self.requests, cfg_scale=CFG_SCALE, num_steps=NUM_STEPS)  # type: ignore[arg-type]


def config_of(schedule: Schedule) -> CacheConfig:
    if len(schedule) == 1:
        return CacheConfig(policy="moeca_forecast", full_steps=list(schedule[0]))
    halves = HalvesConfig(conditional=list(schedule[0]), unconditional=list(schedule[1]))
    return CacheConfig(policy="moeca_forecast", full_steps=halves)


def moved(schedule: Schedule, draw: random.Random) -> Schedule | None:
    """One step of one list shifted; None where it would leave the range, meet another step or be step 0."""
    part = draw.randrange(len(schedule))
    steps = list(schedule[part])
    at = draw.randrange(1, len(steps))
    target = steps[at] + draw.choice(SHIFTS)
    if not 0 < target < NUM_STEPS or target in steps:
        return None
    steps[at] = target
    return (*schedule[:part], tuple(sorted(steps)), *schedule[part + 1 :])


def search(objective: Objective, start: Schedule, seconds: float, seed: int) -> tuple[Schedule, float]:
    """Keep moves that help until the time is up; the result depends on the time, so it is printed as it improves."""
    draw, tried = random.Random(seed), {start}
    best, best_db = start, objective(start)
    print(f"start {best_db:.2f} dB", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        candidate = moved(best, draw)
        if candidate is None or candidate in tried:
            continue
        tried.add(candidate)
        candidate_db = objective(candidate)
        if candidate_db > best_db:
            best, best_db = candidate, candidate_db
            print(f"{best_db:.2f} dB after {len(tried)} schedules: {best}", flush=True)
    return best, best_db


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conditional", required=True, help="full steps to start from, e.g. 0,1,4,11")
    parser.add_argument("--unconditional", help="those of the unconditional half; default: the same list")
    parser.add_argument("--num-images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7, help="of the images that the search sees")
    parser.add_argument("--seconds", type=float, default=420)
    args = parser.parse_args()
    lists = [text for text in (args.conditional, args.unconditional) if text]
    start = tuple(tuple(int(step) for step in text.split(",")) for text in lists)
    torch.set_grad_enabled(False)
    objective = Objective(load_model(SHIPPED_CHECKPOINT), args.num_images, args.seed)
    best, best_db = search(objective, start, args.seconds, seed=0)
    print(f"best {best_db:.2f} dB: {best}")


if __name__ == "__main__":
    main()

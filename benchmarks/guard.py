"""What `cache.guard` does on the shipped model: to images like those of the calibration, and to others.

    OMP_NUM_THREADS=1 python benchmarks/guard.py --tuned configs/tuned/demo_balanced.yaml --out OUT.md

Other images come from networks that the calibration was not made for (all parameters of the blocks times a factor), and
from guidance scales that it was not made for. The reference is always the same network and scale without a cache.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from moeca_dist import Engine
from moeca_dist.cache.statistics import CacheStatistics
from moeca_dist.tuning.candidate import Figures
from moeca_dist.tuning.laboratory import closeness_db
from moeca_dist.tuning.page import table
from moeca_dist.types import Request

FACTORS = (1.0, 1.1, 1.2, 1.3)
SCALES = (3.0, 5.0)


def engines(tuned: Path) -> Iterator[tuple[str, Engine]]:
    """Guarded; every one is done with before the next comes."""
    guarded = Engine.from_config(tuned, ["cache.guard=true"])
    for scale in SCALES:
        sampling = guarded.config.sampling.model_copy(update={"cfg_scale": scale})
        # The file would be refused.
        cache = guarded.config.cache.model_copy(update={"calibration": None})
        config = guarded.config.model_copy(update={"sampling": sampling, "cache": cache})
        yield f"guidance scale {scale:g}", Engine(config, guarded.mesh, guarded.model, calibration=guarded.calibration)
    past = 1.0
    for factor in FACTORS:
        for parameter in guarded.model.blocks.parameters():
            parameter.mul_(factor / past)
        past = factor
        yield "as calibrated" if factor == 1 else f"blocks times {factor:g}", guarded


def row(name: str, engine: Engine, requests: list[Request]) -> list[str]:
    exact_BCHW = engine.without_cache().denoise(requests)
    cells = [name]
    counted = CacheStatistics()
    for guard in (None, engine.setup.guard(len(requests), counted)):
        samples_BCHW, flops = engine.denoise_counting(requests, engine.setup.combine(guard), guard)
        figures = Figures(flops.speedup, tuple(closeness_db(samples_BCHW, exact_BCHW, latent=False).tolist()))
        cells += [f"{figures.mean_db:.2f} dB", f"{figures.speedup:.2f}x"]
    cells += [f"{counted.guard_fired.total():,} of {counted.guard_measured:,}", f"{counted.guard_images}"]
    print(" | ".join(cells), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=401)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    requests = [Request(index, index % 10, args.seed) for index in range(args.num_images)]
    rows = [row(name, engine, requests) for name, engine in engines(args.tuned)]
    head = ["images", "without", "FLOPs", "guarded", "FLOPs", "out of range", "images with more evaluations"]
    text = f"{args.num_images} images of seed {args.seed}, `{args.tuned}`.\n\n"
    args.out.write_text(text + table(head, iter(rows)) + "\n")


if __name__ == "__main__":
    main()

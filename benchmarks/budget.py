"""What a budget of rows costs in quality on the shipped model: images against the uncached ones, for several budgets.

    python benchmarks/budget.py --images 20 --seed 7

One rank, so one group of experts; policy ``moeca_forecast`` with its default steps.
"""

import argparse
from typing import Any

from hardware import REPOSITORY

from moeca_dist import Engine, Request
from moeca_dist.config import load_config
from moeca_dist.evaluation.paired import psnr_db, squared_error, unit_images

BUDGETS: tuple[dict[str, Any], ...] = (
    {},
    *({"exchange": "budget", "budget": rows} for rows in (16, 8, 4, 2)),
    *({"exchange": "budget", "budget": rows, "budget_fill": True} for rows in (8, 2)),
)


def measure(num_images: int, seed: int) -> list[str]:
    """Rows of a table."""
    base = load_config(REPOSITORY / "configs" / "demo.yaml", ["model.device=cpu", "cache.policy=moeca_forecast"])
    requests = [Request(index, index % 10, seed=seed) for index in range(num_images)]
    loaded = Engine.from_config(base)
    exact, _ = loaded.without_cache().generate(requests)
    lines = ["| budget | PSNR | branches computed in cache steps | waited | FLOP |", "|---|---|---|---|---|"]
    for budget in BUDGETS:
        config = base.model_copy(update={"parallel": base.parallel.model_copy(update=budget)})
        images, report = Engine(config, loaded.mesh, loaded.model).generate(requests)
        counts, quality_N = report.branches, psnr_db(squared_error(unit_images(images), unit_images(exact)))
        name = f"{budget['budget']} rows{', filled' if 'budget_fill' in budget else ''}" if budget else "`exact`"
        lines.append(
            f"| {name} | {quality_N.mean():.2f} dB | {counts.refreshed - counts.full_step:,} "
            f"| {counts.deferred:,} | {report.flops.speedup:.2f}x fewer |"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    print("\n".join(measure(arguments.images, arguments.seed)))

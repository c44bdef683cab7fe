"""What late refreshes cost in quality on the shipped model: images against the uncached ones, for several shares.

    python benchmarks/late.py --images 20 --seed 7

One rank: images do not depend on their number. The schedules are uniform, a full step in five.
"""

import argparse
from typing import Any

from hardware import REPOSITORY

from moeca_dist import Engine, Request
from moeca_dist.config import CacheConfig, load_config
from moeca_dist.evaluation.paired import psnr_db, squared_error, unit_images

POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "random", "ratio": 0.2, "order": 1},
    {"policy": "moeca", "refresh_ratio": 0.2},
    {"policy": "dice_skip"},
)
SHARES = (None, 0.25, 0.5, 1.0)


def measure(num_images: int, seed: int) -> list[str]:
    """Rows of a table."""
    base = load_config(REPOSITORY / "configs" / "demo.yaml", ["model.device=cpu"])
    base = base.model_copy(update={"cache": CacheConfig()})
    requests = [Request(index, index % 10, seed=seed) for index in range(num_images)]
    loaded = Engine.from_config(base)
    exact, _ = loaded.generate(requests)
    lines = ["| policy | late | PSNR | late branches, of all computed in cache steps |", "|---|---|---|---|"]
    for policy in POLICIES:
        for share in SHARES:
            cache = CacheConfig(interval=5, late_refresh=share, **policy)
            config = base.model_copy(update={"cache": cache})
            images, report = Engine(config, loaded.mesh, loaded.model).generate(requests)
            counts, quality_N = report.branches, psnr_db(squared_error(unit_images(images), unit_images(exact)))
            computed = counts.refreshed - counts.full_step
            lines.append(
                f"| `{policy['policy']}` | {'none' if share is None else f'{share:g}'} | {quality_N.mean():.2f} dB "
                f"| {counts.late:,} of {computed:,} |"
            )
            print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    print("\n".join(measure(arguments.images, arguments.seed)))

"""Calibrations for ``pareto.py``: one file per configuration that wants one, fitted beforehand.

They are fitted on a seed of their own, which must not be among those that the benchmark measures.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from moeca_dist import load_model
from moeca_dist.config import CacheConfig, Config
from moeca_dist.errors import UserError
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.runtime.engine import Engine
from moeca_dist.tuning.calibrate import calibrate
from moeca_dist.types import Request

SEED, HELD_OUT_SEED, NUM_IMAGES = 7, 8, 40


def with_calibrations(
    configs: Mapping[str, CacheConfig],
    wanted: Iterable[str],
    checkpoint: str,
    num_steps: int,
    cfg_scale: float,
    folder: Path,
) -> dict[str, CacheConfig]:
    """``configs`` with a calibration each where ``wanted``; files that an interrupted run left are used again."""
    done, model = dict(configs), None
    for name in wanted:
        path = folder / (re.sub(r"[^a-z0-9]+", "_", name.lower()) + ".json")
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            model = model or load_model(checkpoint, device="cpu")
            sampling = {"num_steps": num_steps, "cfg_scale": cfg_scale, "batch_size": NUM_IMAGES}
            engine = Engine(Config.model_validate({"cache": configs[name], "sampling": sampling}), Mesh.single(), model)
            outcome = calibrate(engine, requests(SEED), requests(HELD_OUT_SEED))
            partial = path.with_suffix(".partial")
            partial.write_text(outcome.calibration.to_json())
            partial.replace(path)
            print(f"calibrated {name}: {outcome.before} -> {outcome.after} on held-out images", flush=True)
        done[name] = configs[name].model_copy(update={"calibration": path.resolve()})
    return done


def check_seeds(seeds: Iterable[int]) -> None:
    """Raises UserError where the benchmark would measure images that calibrations were fitted on."""
    if SEED in seeds:
        raise UserError(f"--seeds {SEED} is the seed that calibrations are fitted on: measure others")


def requests(seed: int) -> list[Request]:
    torch.set_num_threads(1)
    return [Request(index, index % 10, seed) for index in range(NUM_IMAGES)]

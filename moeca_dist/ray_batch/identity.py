"""The identity of a batch: everything on which an image's bytes depend.

Runs with the same identity are parts of one batch.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeca_dist.config import Config
from moeca_dist.errors import UserError
from moeca_dist.ray_batch.jobs import Source

# Where files lie, which others could have been chosen, how long ranks wait and what the cache may take changes no
# image; weights, calibration, expert placement and the device are compared themselves.
_NEUTRAL_SECTION = "quality."
_NEUTRAL = (
    "model.checkpoint",
    "model.device",
    "cache.calibration",
    "cache.memory_limit",
    "parallel.expert_placement",
    "parallel.timeout_s",
    "parallel.backend",
    "model.cuda_graphs",
)


def batch_identity(config: Config, source: Source, num_images: int, gang_size: int, device: str) -> dict[str, Any]:
    """Return the identity as JSON, for the manifest. Reads the whole checkpoint once.

    The gang's size is part of it. Ranks share a round, and sums in another order differ in the last bits.

    Args:
        config: the resolved configuration.
    """
    settings = dict(_flat(config.model_dump(mode="json"), ""))
    return {
        "config": {
            key: value
            for key, value in settings.items()
            if key not in _NEUTRAL and not key.startswith(_NEUTRAL_SECTION)
        },
        "model": {"sha256": checkpoint_digest(config.model.checkpoint)},
        "calibration": {"sha256": checkpoint_digest(config.cache.calibration)},
        "expert_placement": {"sha256": checkpoint_digest(config.parallel.expert_placement)},
        "requests": source.identity() | {"num_images": num_images},
        "gang_size": gang_size,
        "device": device,
    }


def check_same(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming every difference, unless the batch in the manifest is the wanted one."""
    before, now = dict(_flat(recorded, "")), dict(_flat(wanted, ""))
    differing = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if differing:
        named = "; ".join(
            f"{key.removeprefix('config.')} was {_shown(before.get(key))} and is now {_shown(now.get(key))}"
            for key in differing
        )
        raise UserError(f"--resume would mix different images: {named}; restore it, or choose another --out")


def checkpoint_digest(checkpoint: Path | None) -> str | None:
    """Return the SHA-256 of a file, or of all files of a folder with their names. Returns None without a checkpoint."""
    if checkpoint is None:
        return None
    if checkpoint.is_file():
        return _digest(checkpoint)
    total = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(checkpoint)} {_digest(path)}\n".encode())
    return total.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text[:12] + "..." if len(text) == 64 else text

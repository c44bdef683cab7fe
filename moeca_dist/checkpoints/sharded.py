"""Our sharded checkpoint: a folder in which a rank opens only the files that hold its own experts.

    config.json                             the ModelSpec, in full
    dense.safetensors                       everything but the routed experts
    experts-00000-of-00008.safetensors ...  routed experts of all MoE blocks, by contiguous ranges of expert ids
    model.safetensors.index.json            {"metadata": {...}, "weight_map": {key: file}}, the Hugging Face index

Keys and values are those of the original checkpoint. Beyond ``total_size`` the index metadata states the size of every
file and the dtype and shape of every tensor. So a rank checks the whole checkpoint from the index alone. All ranks find
the same fault, even in a file that only one of them would have opened.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moeca_dist.checkpoints.safetensors_file import TensorInfo, write_safetensors
from moeca_dist.errors import UserError
from moeca_dist.models.spec import ModelSpec

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
DENSE_FILE = "dense.safetensors"


@dataclass(frozen=True)
class ShardedIndex:
    """The contents of the index and config of a sharded folder. No tensor file has been opened."""

    folder: Path
    infos: Mapping[str, TensorInfo]
    weight_map: Mapping[str, str]
    stated_spec: Mapping[str, Any] | None


def plan_files(
    keys: Sequence[str], expert_of_key: Mapping[str, int], num_experts: int, num_shards: int
) -> dict[str, list[str]]:
    """Assign every key to a file, and return the keys by file name.

    Routed experts go by ranges of ids, with at most one file per expert. All other keys go into one file.

    Raises UserError if ``num_shards`` is not positive.
    """
    if num_shards < 1:
        raise UserError(f"num_shards is {num_shards}: state at least 1")
    num_files = min(num_shards, num_experts)
    files: dict[str, list[str]] = {DENSE_FILE: []}
    files |= {f"experts-{index:05d}-of-{num_files:05d}.safetensors": [] for index in range(num_files)}
    names = list(files)
    for key in keys:
        expert = expert_of_key.get(key)
        files[DENSE_FILE if expert is None else names[1 + expert * num_files // num_experts]].append(key)
    return files


def write_sharded(
    folder: Path,
    spec: ModelSpec,
    files: Mapping[str, Sequence[str]],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
) -> None:
    """Fill an existing empty folder. ``read`` is called for one tensor at a time, in file order.

    Raises OSError if the folder cannot be written.
    """
    for name, keys in files.items():
        write_safetensors(folder / name, {key: infos[key] for key in keys}, read, {"format": "pt"})
    index = {
        "metadata": {
            "total_size": sum(info.nbytes for info in infos.values()),
            "file_sizes": {name: (folder / name).stat().st_size for name in files},
            "tensors": {key: [info.dtype_name, list(info.shape)] for key, info in infos.items()},
        },
        "weight_map": {key: name for name, keys in files.items() for key in keys},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(spec.to_dict(), indent=2) + "\n")
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def read_index(folder: Path) -> ShardedIndex:
    """Read the index of a sharded folder. Check that it is consistent and that every file has its stated size.

    Raises UserError naming the file at fault.
    """
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        raise UserError(f"{folder} holds no {INDEX_FILE}: name a checkpoint file{_suggestion(folder)}")
    index = _read_json(index_path)
    try:
        tensors, file_sizes = index["metadata"]["tensors"], index["metadata"]["file_sizes"]
        infos = {key: TensorInfo.from_names(dtype, shape) for key, (dtype, shape) in tensors.items()}
        weight_map = dict(index["weight_map"])
        if infos.keys() != weight_map.keys() or not file_sizes.keys() >= set(weight_map.values()):
            raise ValueError("its parts name different tensors or files")
        if any(Path(name).name != name for name in file_sizes):
            raise ValueError("it names a file outside the folder")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{index_path} is not an index written by 'moeca convert' ({error}): convert again") from error
    for name, size in file_sizes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {INDEX_FILE} lists it: copy it again or convert again")
        if path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes instead of {size}: copy it again or convert again")
    config_path = folder / CONFIG_FILE
    return ShardedIndex(folder, infos, weight_map, _read_json(config_path) if config_path.is_file() else None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): convert the checkpoint again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: convert the checkpoint again")
    return content


def _suggestion(folder: Path) -> str:
    """A published repository holds its files some folders down: say which one to name."""
    found = sorted(p for suffix in ("safetensors", "pt", "pth") for p in folder.glob(f"**/*.{suffix}"))
    return f", e.g. {found[0]}" if found else " or a folder written by 'moeca convert'"

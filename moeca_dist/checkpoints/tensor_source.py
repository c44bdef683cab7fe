"""Checkpoints opened lazily: names, shapes and dtypes first, each tensor's data only when it is asked for.

Published checkpoints are ``.pt`` files that wrap the weights, ``.safetensors`` files, and folders written by ``moeca
convert``. The ``.pt`` files also hold optimiser state, which is never needed here.
"""

import argparse
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_dist.checkpoints.safetensors_file import SafetensorsFile, TensorInfo
from moeca_dist.checkpoints.sharded import read_index
from moeca_dist.errors import UserError
from moeca_dist.models.spec import ModelSpec

logger = logging.getLogger(__name__)

SPEC_ENTRY = "model_spec"  # our own addition to .safetensors metadata and .pt files
_WRAPPERS = ("ema", "model", "module", "state_dict")  # the averaged weights first: they are what samples are made with
_PREFIXES = ("module.", "model.")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True)
class TensorSource:
    """A checkpoint opened for reading, under the original keys without any wrapping.

    ``get(key)`` returns a CPU tensor that may be a view of the mapped file: copy it, never write to it. ``stated_spec``
    is the full hyper-parameter dict (``ModelSpec.to_dict``) if the checkpoint carries one.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    get: Callable[[str], Tensor]
    stated_spec: Mapping[str, Any] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.infos.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: info.dtype for key, info in self.infos.items()}


def open_source(path: str | os.PathLike[str]) -> TensorSource:
    """Open a ``.pt``/``.pth`` or ``.safetensors`` file or a sharded folder.

    Raises UserError, naming the file and the remedy, if the file is missing, empty, truncated or of another type.
    Raises UserError also if it holds pickled code, which is never executed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path")
    if not os.access(path, os.R_OK):
        raise UserError(f"checkpoint {path} may not be read: check its permissions")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {path} is empty: download it again")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"version https:/"):
        raise UserError(f"{path} is a Git LFS pointer, not the checkpoint itself: run 'git lfs pull' in its repository")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path, head)
    raise UserError(f"{path} is no checkpoint by its name: expected .pt, .pth, .safetensors or a sharded folder")


def spec_metadata(spec: ModelSpec) -> dict[str, str]:
    """Return safetensors metadata from which ``open_source`` reads the full ``spec`` back."""
    return {"format": "pt", SPEC_ENTRY: json.dumps(spec.to_dict())}


def _open_safetensors(path: Path) -> TensorSource:
    file = SafetensorsFile(path)
    if not file.infos:
        raise UserError(f"{path} holds no tensor: download or convert it again")
    original_of = _strip_prefixes(file.infos)
    stated = file.metadata.get(SPEC_ENTRY)
    try:
        spec = None if stated is None else json.loads(stated)
    except ValueError as error:
        raise UserError(f"{path}: its metadata entry {SPEC_ENTRY} is not JSON ({error}): convert it again") from error
    return TensorSource(
        path,
        {key: file.infos[original] for key, original in original_of.items()},
        lambda key: file.get(original_of[key]),
        spec,
    )


def _open_torch(path: Path, head: bytes) -> TensorSource:
    content = _load_torch(path, head)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    spec = content.get(SPEC_ENTRY)
    weights = content
    while wrapper := next((w for w in _WRAPPERS if isinstance(weights.get(w), Mapping) and weights[w]), None):
        weights = weights[wrapper]
    foreign = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if foreign or not weights:
        names = ", ".join(repr(key) for key in foreign[:4]) or "nothing"
        raise UserError(f"{path} holds {names} where tensors by name are expected: save model.state_dict()")
    original_of = _strip_prefixes(weights)
    tensors: dict[str, Tensor] = {key: weights[original] for key, original in original_of.items()}
    infos = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    return TensorSource(path, infos, tensors.__getitem__, spec)


def _load_torch(path: Path, head: bytes) -> Any:
    is_zip = head.startswith(_ZIP_MAGIC)
    if not is_zip and not head.startswith(_PICKLE_MAGIC):
        raise UserError(f"{path} is not a PyTorch file: download it again or check the path")
    if not is_zip:
        logger.warning("%s is in PyTorch's old format: read whole; 'moeca convert' makes it loadable lazily", path)
    try:
        # DSMoE checkpoints hold their command line as an argparse.Namespace: plain data, allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        content = f"pickled code ({named[1]})" if named else "a damaged pickle or pickled objects"
        raise UserError(
            f"{path} holds {content}, which is never run: download it again, or save model.state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise UserError(f"{path} is truncated or damaged ({reason}): download it again") from error


def _open_folder(folder: Path) -> TensorSource:
    index = read_index(folder)

    @cache
    def opened(name: str) -> SafetensorsFile:
        return SafetensorsFile(folder / name)

    def get(key: str) -> Tensor:
        file = opened(index.weight_map[key])
        if file.infos.get(key) != index.infos[key]:
            raise UserError(f"{file.path} does not hold {key} as the index states: convert the checkpoint again")
        return file.get(key)

    return TensorSource(folder, index.infos, get, index.stated_spec)


def _strip_prefixes(keys: Mapping[str, Any]) -> dict[str, str]:
    """Key without the prefixes that wrappers (data parallelism, Lightning) put before *every* key -> key as stored."""
    original_of = {key: key for key in keys}
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in original_of)), None):
        original_of = {key.removeprefix(prefix): original for key, original in original_of.items()}
    return original_of

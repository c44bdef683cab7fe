"""Conversion of checkpoints to another format: our sharded folder, one safetensors file, or a ``.pt`` file.

Keys stay in the original layout in all formats, so nothing is lost in either direction. Tensors are streamed: the model
may be larger than memory.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from moeca_dist.checkpoints.load import check_fits, full_precision_keys, infer_spec
from moeca_dist.checkpoints.options import LoadOptions, parse_dtype
from moeca_dist.checkpoints.safetensors_file import DTYPE_NAMES, TensorInfo, write_safetensors
from moeca_dist.checkpoints.sharded import INDEX_FILE, plan_files, write_sharded
from moeca_dist.checkpoints.tensor_source import SPEC_ENTRY, TensorSource, open_source, spec_metadata
from moeca_dist.errors import UserError
from moeca_dist.models.registry import FAMILIES, build_model
from moeca_dist.models.spec import ModelSpec

Format = Literal["sharded", "safetensors", "pt"]
DEFAULT_NUM_SHARDS = 8
_SUFFIXES = {"safetensors": (".safetensors",), "pt": (".pt", ".pth")}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    num_shards: int | None = None,
    to: Format = "sharded",
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Path:
    """Write the checkpoint ``src`` to ``dst`` and return ``dst``. It appears whole or not at all.

    Args:
        num_shards: number of expert files of the sharded format (default 8, at most one per expert).
        dtype: dtype of the weights, except those that the model keeps in fp32. None keeps every tensor bit for bit.
        options: hyper-parameters of ``load_model`` that the shapes do not tell. They are stored, so loading ``dst``
            needs none.

    Raises UserError, in one line, if ``src`` is not a complete checkpoint of a known family. Raises UserError also if
    ``dst`` exists (without ``overwrite``), does not fit the format, or cannot be written.
    """
    source_path, target = Path(src).expanduser(), Path(dst).expanduser()
    _check_target(source_path, target, to, overwrite)
    if num_shards is not None and to != "sharded":
        raise UserError(f"num_shards has no effect on a {to} file: leave it out, or convert to the sharded format")
    source = open_source(source_path)
    spec = infer_spec(source, LoadOptions.parse(options).model)
    check_fits(source, spec)
    infos = _target_infos(source, spec, None if dtype is None else parse_dtype(dtype))
    try:
        with _staged(target) as staging:
            match to:
                case "sharded":
                    _write_folder(
                        staging, source, spec, infos, DEFAULT_NUM_SHARDS if num_shards is None else num_shards
                    )
                case "safetensors":
                    write_safetensors(staging, infos, source.get, spec_metadata(spec))
                case "pt":
                    _write_pt(staging, source, spec, infos)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    return target


def _check_target(src: Path, dst: Path, to: str, overwrite: bool) -> None:
    if to not in get_args(Format):
        raise UserError(f"unknown checkpoint format {to!r}: choose one of {', '.join(get_args(Format))}")
    suffixes = _SUFFIXES.get(to)
    if suffixes is not None and dst.suffix not in suffixes:
        raise UserError(f"{dst} would not be recognised as a {to} file: end its name in {' or '.join(suffixes)}")
    source, target = src.resolve(), dst.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UserError(f"{dst} overlaps the source {src}: choose another target")
    if not dst.exists() or (dst.is_dir() and to == "sharded" and not any(dst.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{dst} exists: choose another target, or overwrite it (--overwrite)")
    if dst.is_dir() != (to == "sharded") or (dst.is_dir() and not (dst / INDEX_FILE).is_file()):
        raise UserError(f"{dst} holds something else than a {to} checkpoint and is not overwritten: remove it yourself")


def _target_infos(source: TensorSource, spec: ModelSpec, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        kept = full_precision_keys(build_model(spec))
    infos = {}
    for key, info in source.infos.items():
        if info.dtype not in DTYPE_NAMES:
            raise UserError(f"{source.path}: {key} is stored as {info.dtype}, which cannot be converted")
        infos[key] = info if dtype is None or key in kept else replace(info, dtype=dtype)
    return infos


def _write_folder(
    folder: Path, source: TensorSource, spec: ModelSpec, infos: dict[str, TensorInfo], num_shards: int
) -> None:
    family = FAMILIES[spec.family]
    expert_of_key = {
        family.expert_key(block, expert, projection): expert
        for block in spec.moe_blocks
        for expert in range(spec.num_experts)
        for projection in ("gate", "up", "down")
    }
    files = plan_files(list(infos), expert_of_key, spec.num_experts, num_shards)
    folder.mkdir()
    write_sharded(folder, spec, files, infos, source.get)


def _write_pt(path: Path, source: TensorSource, spec: ModelSpec, infos: dict[str, TensorInfo]) -> None:
    # torch.save wants all tensors at once: as views of a mapped file they need no memory.
    mapped_path = path.with_suffix(".safetensors")
    write_safetensors(mapped_path, infos, source.get, {})
    mapped = open_source(mapped_path)
    # Readers of the published .pt files look for the weights under "ema".
    torch.save({"ema": {key: mapped.get(key) for key in infos}, SPEC_ENTRY: spec.to_dict()}, path)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A path on the same file system that takes ``target``'s place at the end, or vanishes on any error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging = workplace / target.name
        yield staging
        if target.is_dir():
            # A rename replaces a file or an empty folder, not a full one.
            os.replace(target, workplace / "replaced")
        os.replace(staging, target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)

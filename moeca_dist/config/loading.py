"""Reading of a configuration: values from the file and the overrides, with errors in the user's words."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moeca_dist.config.former_keys import explain_refused_value, explain_unknown_key
from moeca_dist.config.schema import Config, PathField
from moeca_dist.config.yaml_file import parse_yaml, read_sections
from moeca_dist.errors import UserError


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Load a configuration: defaults < the YAML file at ``path`` < ``overrides`` such as ``"sampling.num_steps=50"``.

    Relative paths in the file resolve against the file's folder, those in an override against the current folder. A
    calibration in the file belongs to the file's cache and sampling. An override that changes either drops the
    calibration. It also drops the full steps and order for which the calibration was fitted.

    Raises `UserError` (one line with every problem) for keys and values that are missing, unknown or not allowed.
    """
    path = Path(path)
    tree = _anchored(read_sections(path), path.parent)
    changes = [_anchored(_parse_override(override), Path()) for override in overrides]
    overridden = {key for change in changes for key in _leaf_keys(change)}
    tree = _without_stale_calibration(tree, changes)
    for change in changes:
        tree = _merged(tree, change)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for details in error.errors():
            key = ".".join(str(part) for part in details["loc"])
            stated = any(f"{leaf}.".startswith(f"{key}.") for leaf in overridden)
            problems.setdefault("--set" if key and stated else str(path), []).append(_explain(details))
        raise UserError("; ".join(f"{place}: {'; '.join(found)}" for place, found in problems.items())) from None


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"--set {override}: expected key=value, e.g. --set sampling.num_steps=50")
    tree = parse_yaml(text, f"--set {override}")
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return tree


def _anchored(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``tree`` with its relative paths made absolute from ``folder`` (symbolic links are left as they are)."""
    result = dict(tree)
    for key, info in _FIELDS.items():
        section, _, field = key.partition(".")
        values = result.get(section)
        if info.annotation == (PathField | None) and isinstance(values, dict) and isinstance(values.get(field), str):
            absolute = os.path.abspath(folder / Path(values[field]).expanduser())
            result[section] = values | {field: absolute}
    return result


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _without_stale_calibration(tree: dict[str, Any], changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The file's sections, less a calibration and what it was fitted for where an override changes either."""
    cache = tree.get("cache")
    if not isinstance(cache, dict) or "calibration" not in cache:
        return tree
    sampling = tree.get("sampling", {})
    for change in changes:
        of_cache, of_sampling = change.get("cache", {}), change.get("sampling", {})
        stale = isinstance(of_cache, dict) and of_cache.keys() - {"calibration", "location", "memory_limit"}
        for key in ("num_steps", "cfg_scale"):
            if isinstance(of_sampling, dict) and key in of_sampling and isinstance(sampling, dict):
                stale = stale or of_sampling[key] != sampling.get(key)
        if stale:
            kept = {key: value for key, value in cache.items() if key not in ("calibration", "full_steps", "order")}
            return tree | {"cache": kept}
    return tree


def _leaf_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# ---- explaining ------------------------------------------------------------------------------------------------------


def _explain(details: ErrorDetails) -> str:
    """One problem that pydantic found, in the words of the file it stands in."""
    key = ".".join(str(part) for part in details["loc"])
    match details["type"]:
        case "value_error":  # from _check_combinations, which names its keys
            return details["msg"].removeprefix("Value error, ")
        case "extra_forbidden":
            return explain_unknown_key(key) or f"unknown key {key}; {_nearest(key)}"
        case "model_type":
            allowed = f"must be a section of keys ({', '.join(_SECTIONS[key].model_fields)})"
        case "path_type":
            allowed = "must be a path"
        case "literal_error" if (gone := explain_refused_value(key, details["input"])) is not None:
            return gone
        case "int_type":
            allowed = "must be an integer"
        case _:
            allowed = details["msg"].replace("Input should be", "must be").replace("a valid ", "a ")
    return f"{key} {allowed}, not {details['input']!r}"


def _nearest(key: str) -> str:
    """The valid key that ``key`` most likely stands for: mistyped, or put into the wrong section."""
    leaf = key.rpartition(".")[2]
    moved = [candidate for candidate in _FIELDS if candidate.endswith(f".{leaf}")]
    sections = list(_SECTIONS) if "." not in key else []
    # Above the default cutoff, because the section's name alone is more than half of a short key.
    close = moved or difflib.get_close_matches(key, [*_FIELDS, *sections], n=1, cutoff=0.7)
    if not close:
        by_leaf = {candidate.partition(".")[2]: candidate for candidate in _FIELDS}
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)]
    if close:
        return f"did you mean {close[0]}?"
    section = _SECTIONS.get(key.partition(".")[0], Config)
    return f"known there are {', '.join(section.model_fields)}"


_SECTIONS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {name: type(field.get_default()) for name, field in Config.model_fields.items()}
)
_FIELDS: Mapping[str, FieldInfo] = MappingProxyType(
    {f"{name}.{key}": field for name, section in _SECTIONS.items() for key, field in section.model_fields.items()}
)

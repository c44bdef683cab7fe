"""Reading of a configuration's YAML: every mistake becomes one line that names the file and the line."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from moeca_dist.errors import UserError


class _ConfigLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as a number (YAML 1.1 takes it for a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_sections(path: Path) -> dict[str, Any]:
    """Read the sections of a YAML file by name.

    Raises `UserError` with file and line if the file is missing or malformed.
    """
    if not path.is_file():
        raise UserError(_missing_config(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections of keys (model: ..., sampling: ...), not {type(tree).__name__}")
    # A section whose keys are all commented out reads as null: it asks for the defaults.
    return {str(key): {} if value is None else value for key, value in (tree or {}).items()}


def parse_yaml(text: str, source: str) -> Any:
    """Parse ``text`` as YAML. Raises a `UserError` that names ``source`` and the line."""
    try:
        return yaml.load(text, Loader=_ConfigLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: invalid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: invalid YAML: {' '.join(str(error).split())}") from None


def _missing_config(path: Path) -> str:
    if path.is_dir():
        return f"the config {path} is a folder; name one of its files"
    if not path.parent.is_dir():
        return f"the config {path} does not exist, nor does the folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.glob("*.y*ml"))
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    return f"the config {path} does not exist{hint}; configs in {path.parent}: {', '.join(names) or 'none'}"

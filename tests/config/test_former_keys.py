"""Keys that a configuration once had: each is refused in one line that names what took its place."""

from pathlib import Path

import pytest

from moeca_dist.config import Config, load_config
from moeca_dist.config.former_keys import REMOVED_KEYS, REMOVED_VALUES, RENAMED_KEYS
from moeca_dist.errors import UserError


def known_keys() -> set[str]:
    return {
        f"{name}.{key}"
        for name, section in Config.model_fields.items()
        for key in type(section.get_default()).model_fields
    }


def refusal(tmp_path: Path, key: str, value: str) -> str:
    section, _, leaf = key.partition(".")
    path = tmp_path / "old.yaml"
    path.write_text(f"{section}: {{{leaf}: {value}}}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_removed_keys_are_answered_with_what_took_their_place(tmp_path: Path) -> None:
    for key, remedy in REMOVED_KEYS.items():
        assert key not in known_keys()
        assert f"{key} no longer exists: {remedy}" in refusal(tmp_path, key, "1")


def test_renamed_keys_are_answered_with_their_new_names(tmp_path: Path) -> None:
    for old, new in RENAMED_KEYS.items():
        assert old not in known_keys() and new in known_keys()
        assert f"{old} is now called {new}: rename it" in refusal(tmp_path, old, "1")


def test_removed_values_are_answered_with_what_took_their_place(tmp_path: Path) -> None:
    for (key, value), remedy in REMOVED_VALUES.items():
        assert key in known_keys()
        assert f"{key} {value} no longer exists: {remedy}" in refusal(tmp_path, key, value)

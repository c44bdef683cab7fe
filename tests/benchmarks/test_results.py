"""Folders of results: their names say date and hardware, their files have one name each."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.common import results


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("AMD EPYC (family 26, model 2)", "EPYC"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (family 6, model 143)", "Xeon-Platinum-8481C"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB-HBM3"),
        ("", "unknown"),
    ],
)
def test_hardware_has_a_short_name(model: str, short: str) -> None:
    assert results.short_name(model) == short


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = results.default_folder("network")
    assert folder.parent == results.RESULTS / "network"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d+x[\w.-]+", folder.name)
    results.save(tmp_path / "a" / "b", {"rows": [1]}, "| a |\n")
    assert json.loads((tmp_path / "a" / "b" / "data.json").read_text()) == {"rows": [1]}
    assert (tmp_path / "a" / "b" / "table.md").read_text() == "| a |\n"

"""Where a benchmark keeps its results: one folder for each run, with the same names in all of them."""

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.hardware import REPOSITORY, cpu_model

RESULTS = REPOSITORY / "benchmarks" / "results"
DATA, TABLE, PLOT = "data.json", "table.md", "plot.png"
OUT_HELP = "folder of the results; default: %(default)s"
# Makers and product lines say less than the model's name.
LEFT_OUT = re.compile(r"\([^)]*\)|\b(AMD|Intel|NVIDIA|GeForce|CPU|Processor)\b|@.*")


def default_folder(benchmark: str, device: str = "cpu") -> Path:
    """Return the folder of a run that starts today on this machine."""
    return RESULTS / benchmark / f"{datetime.now(UTC):%Y-%m-%d}_{hardware_name(device)}"


def hardware_name(device: str) -> str:
    """Return number and model of the processors, e.g. 2xEPYC."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    number = torch.cuda.device_count() if on_gpu else os.cpu_count()
    return f"{number}x{short_name(torch.cuda.get_device_name() if on_gpu else cpu_model())}"


def short_name(model: str) -> str:
    """Return a processor's name without its maker, fit for a folder's name."""
    return "-".join(re.findall(r"[\w.]+", LEFT_OUT.sub(" ", model))) or "unknown"


def save(folder: Path, data: Mapping[str, Any], table: str) -> None:
    """Write a run's figures and its table; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).write_text(json.dumps(data, indent=1) + "\n")
    (folder / TABLE).write_text(table)

"""Under which conditions a benchmark ran: machine, versions, commit, date, command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def conditions(device: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": command(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def command() -> str:
    """The command line of this process, as one gives it in the checkout's root."""
    module = sys.modules["__main__"].__spec__
    program = [os.path.relpath(sys.argv[0], REPOSITORY)] if module is None else ["-m", module.name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def busy_core_seconds() -> float:
    """Core-seconds this machine has worked since it booted, for everybody; 0 where the kernel does not say (not Linux).

    What exceeds a benchmark's own CPU time was taken by others.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    """The checked-out commit, marked where tracked files differ from it; "unknown" outside a repository."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    """Name and family/model numbers: virtual machines often hide the marketing name."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"

"""What ``network.py`` and ``scaling.py`` compare: the exact path and caching policies, by their names in the tables."""

from pathlib import Path

from benchmarks.common.hardware import REPOSITORY
from benchmarks.scaling.rank_job import Cell

CONFIGS = REPOSITORY / "configs"

UNCACHED = "uncached"
DEFAULT = "network_forecast"
BRANCHES = "moeca_forecast"

CELLS: tuple[Cell, ...] = (
    Cell(UNCACHED, {"policy": "none"}),
    Cell(DEFAULT, {"policy": "network_forecast"}),
    Cell(BRANCHES, {"policy": "moeca_forecast"}),
    Cell("moeca_forecast, owner", {"policy": "moeca_forecast", "location": "owner"}),
    Cell("taylorseer", {"policy": "taylorseer"}),
    Cell("fora", {"policy": "fora"}),
    Cell("moeca", {"policy": "moeca"}),
    Cell("uncached, int8 rows", {"policy": "none"}, {"row_dtype": "int8"}),
    Cell("network_forecast, int8 rows", {"policy": "network_forecast"}, {"row_dtype": "int8"}),
)
# On one rank all values are at home and nothing travels: what stands for these cells there.
ON_ONE_RANK = {
    "moeca_forecast, owner": BRANCHES,
    "uncached, int8 rows": UNCACHED,
    "network_forecast, int8 rows": DEFAULT,
}
CODED = frozenset(cell.name for cell in CELLS if "row_dtype" in cell.parallel)
AT_OWNERS = frozenset(cell.name for cell in CELLS if cell.cache.get("location") == "owner")
# What is measured where nothing else is asked for.
COMMON = (UNCACHED, DEFAULT, BRANCHES, "moeca_forecast, owner", "taylorseer")


def config_path(name: str) -> Path:
    """A name in ``configs/``, or a file."""
    path = Path(name)
    return path if path.suffix else CONFIGS / f"{name}.yaml"


def chosen(names: list[str], ep_size: int) -> tuple[Cell, ...]:
    """The cells called ``names``, or on one rank what stands for them there."""
    by_name = {cell.name: cell for cell in CELLS}
    found = names if ep_size > 1 else [ON_ONE_RANK.get(name, name) for name in names]
    return tuple(by_name[name] for name in dict.fromkeys(found))

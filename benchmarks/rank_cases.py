"""What ``network.py`` and ``scaling.py`` compare: the exact path and caching policies, by their names in the tables."""

from rank_job import Cell

UNCACHED = "uncached"
DEFAULT = "moeca_forecast"

CELLS: tuple[Cell, ...] = (
    Cell(UNCACHED, {"policy": "none"}),
    Cell(DEFAULT, {"policy": "moeca_forecast"}),
    Cell("moeca_forecast, owner", {"policy": "moeca_forecast", "placement": "owner"}),
    Cell("taylorseer", {"policy": "taylorseer"}),
    Cell("fora", {"policy": "fora"}),
    Cell("moeca", {"policy": "moeca"}),
)
# The quick four: what is measured where nothing else is asked for.
COMMON = (UNCACHED, DEFAULT, "moeca_forecast, owner", "taylorseer")


def chosen(names: list[str], ep_size: int) -> tuple[Cell, ...]:
    """The cells called ``names``; placement ``owner`` only where there are other ranks to own something."""
    by_name = {cell.name: cell for cell in CELLS}
    cells = [by_name[name] for name in names]
    return tuple(cell for cell in cells if ep_size > 1 or cell.cache.get("placement") != "owner")

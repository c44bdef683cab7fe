"""Keys and values that a configuration once had, and what took their place.

An old file is answered with one line that names the remedy; nothing in it is silently ignored.
"""

from collections.abc import Mapping
from types import MappingProxyType

REMOVED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        # section.key: what to do instead
        "parallel.two_batch_overlap": "remove it; on slow links parallel.rows=int8 wins more",
    }
)
RENAMED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        # old section.key: new section.key
    }
)
REMOVED_VALUES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("parallel.exchange", "planned"): "remove it, the ranks agree in every layer on what travels",
    }
)


def explain_unknown_key(key: str) -> str | None:
    """Return what took the place of ``key`` (``section.key``); None if it never existed."""
    if key in REMOVED_KEYS:
        return f"{key} no longer exists: {REMOVED_KEYS[key]}"
    if key in RENAMED_KEYS:
        return f"{key} is now called {RENAMED_KEYS[key]}: rename it"
    return None


def explain_refused_value(key: str, value: object) -> str | None:
    """Return what took the place of ``value`` of ``key``; None if it was never allowed."""
    if isinstance(value, str) and (key, value) in REMOVED_VALUES:
        return f"{key} {value} no longer exists: {REMOVED_VALUES[key, value]}"
    return None
